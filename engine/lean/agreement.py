"""Whether a rewritten part of a layer computes what the part itself does."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Of the largest number in the result. Rounding differs, since a rewrite sums in another order and
# rounds less often between; a wrong formula is off by far more.
TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def agrees(result: Tensor, expected: Tensor, slack: float = 1.0) -> bool:
    """Whether two tensors are equal but for rounding; never where a number is not finite.

    Args:
        slack: how many times the usual rounding is let pass.
    """
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    reference = expected.float()
    scale = float(reference.abs().max())
    worst = float((result.float() - reference).abs().max())
    return worst <= TOLERANCE[expected.dtype] * slack * max(scale, 1e-6)  # False for NaN
