"""Make sure that a model keeps the samples of one packed row apart.

transformers tells them apart by their positions, where the architecture passes these on to its
mask; nothing says which do. So the model itself is asked, with two short random samples in one row
and in two.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from engine.jobs.base_model import Placement
from engine.jobs.batches import pad
from engine.jobs.token_rows import TokenRow
from proto.errors import UsageError

LENGTHS: Final = (7, 5)
# Of the largest logit. Half precision rounds in another order when shapes differ.
TOLERANCE: Final = {torch.float32: 1e-3}
HALF_TOLERANCE: Final = 5e-2


def check_packing(model: Any, placement: Placement, vocab_size: int) -> None:
    """Compare the logits of two samples together and apart.

    Raises:
        UsageError: they differ; the model does not keep them apart.
    """
    draw = np.random.default_rng(0)
    rows = []
    for length in LENGTHS:
        ids = draw.integers(0, vocab_size, size=length)
        rows.append(TokenRow(ids, ids, np.arange(length)))
    packed = TokenRow(
        np.concatenate([row.input_ids for row in rows]),
        np.concatenate([row.labels for row in rows]),
        np.concatenate([row.position_ids for row in rows]),
    )
    was_training = model.training
    model.eval()
    together = _logits(model, placement, packed)
    apart = torch.cat([_logits(model, placement, row) for row in rows])
    model.train(was_training)
    error = float((together - apart).abs().max() / apart.abs().max())
    if error > TOLERANCE.get(placement.dtype, HALF_TOLERANCE):
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        raise UsageError(
            f"--packing: {name} does not keep samples of one row apart (its logits change by "
            f"{100 * error:.2g} %): leave it out, samples then stand in rows of their own."
        )


def _logits(model: Any, placement: Placement, row: TokenRow) -> Tensor:
    """(tokens, vocabulary) in float32."""
    tensors = {name: it.to(placement.device) for name, it in pad([row], True).items()}
    del tensors["labels"]
    with torch.no_grad(), placement.autocast():
        logits: Tensor = model(**tensors, use_cache=False).logits
    return logits[0].float()
