"""The optimizer that all ways of training take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from engine.jobs.settings import TrainingSettings

# transformers' defaults for AdamW, which are torch's.
BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8


def new_optimizer(
    settings: TrainingSettings, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW over the weights that learn; its rate is set before each step."""
    return torch.optim.AdamW(
        list(parameters),
        lr=settings.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=settings.weight_decay,
    )
