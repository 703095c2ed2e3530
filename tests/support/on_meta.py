"""Run a stage on a device that computes nothing, to see what it would ask a GPU back for.

A tensor on torch's meta device has no numbers: whoever wants one gets an error. So a step that runs
there can be recorded on a GPU, where asking means to wait.
"""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from engine.lean import attention_part, fitting, norm
from engine.stage import Stage

META: Final = torch.device("meta")


def move(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all tensors of a stage of plain modules there, and fit its layers anew."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def there(tensor: Tensor) -> Tensor:
        return moved.setdefault(id(tensor), (tensor.to(META), tensor))[0]

    stage.run_plainly()
    for module in stage.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved_parameter = nn.Parameter(there(parameter), requires_grad=False)
                module._parameters[name] = moved_parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, there(value))
    stage.device = META
    # Where there are no numbers to compare, the quick ways are taken.
    monkeypatch.setattr("engine.chunk_attention._agreeing", Always())
    with monkeypatch.context() as patch:
        for it in (fitting, attention_part, norm):
            patch.setattr(it, "agrees", _alike)
        # transformers looks at positions, but not while a step is recorded.
        patch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: True)
        fitting.fit_layers(stage)


def _alike(one: Tensor, other: Tensor, slack: float = 1.0) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


class Always(dict[Any, bool]):
    """Says yes to whatever is asked."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> bool:
        return True
