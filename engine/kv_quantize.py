"""Keys and values in 8 bits: the arithmetic, in torch.

Each token's head is whole numbers from -127 to 127 and one scale: its largest magnitude over 127,
in bfloat16. That has the range of every dtype that a model runs in, so no key is too large or too
small; and as the numbers are divided by the scale as it is kept, its own rounding costs nothing but
a grid that is a little coarser or finer. The kernels write the same to the last bit
(kernels/attention_int8.h). A head with a number that is none has a scale that is none, so that it
is found where the result is judged. Knows no blocks.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LARGEST: Final = 127
SCALE_DTYPE: Final = torch.bfloat16


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each head of some tokens.

    Args:
        rows: (tokens, heads, size), of any float dtype.
    Returns:
        Numbers, int8 of the same shape, and scales (tokens, heads) bfloat16.
    """
    wide = rows.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST).to(SCALE_DTYPE)
    steps = scales.float().unsqueeze(-1)
    numbers = (wide / steps).clamp_(-LARGEST, LARGEST).round_()
    usable = (steps > 0) & (steps < float("inf"))  # a comparison with what is no number is false
    return torch.where(usable, numbers, 0.0).to(torch.int8), scales


def widened(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantized` rounded to, in `dtype`: (tokens, heads, size)."""
    if dtype == SCALE_DTYPE:
        return numbers.to(dtype).mul_(scales.unsqueeze(-1))
    return numbers.float().mul_(scales.float().unsqueeze(-1)).to(dtype)
