"""Weights that are stored as small numbers, each with the scale of its block, row or tensor.

Float8 and int8, which compressed-tensors stores as well, and experts in 4-bit floats (MXFP4). Knows
which scale is whose; reads no tensor, and knows nothing of models.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from engine.stored_group import Finder, Group, Parts

FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
# Values of a 4-bit float with 2 bits of exponent and 1 of mantissa (OCP Microscaling Formats 1.0).
_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8(finder: Finder) -> dict[str, Group]:
    """Float8 weights with a scale for each block of rows and columns, or for all."""
    block = finder.config.get("weight_block_size")
    groups = {}
    for base, key in finder.ending("_scale_inv"):
        if base in finder.checkpoint:
            groups[base] = scaled_numbers(finder, base, key, None, block, FLOAT8)
    return groups


def scaled_numbers(
    finder: Finder,
    key: str,
    scale_key: str,
    zeros_key: str | None,
    block: Any,
    kinds: tuple[torch.dtype, ...],
) -> Group:
    """Small numbers, each multiplied with the scale of its block, row, or tensor."""
    entry, scale = finder.checkpoint.announced(key), finder.checkpoint.announced(scale_key)
    shape = entry.shape
    finder.require(len(shape) >= 2 and 0 not in shape, key)
    finder.require_kind(key, *kinds)
    finder.require_kind(scale_key)
    sizes = _block_sizes(shape, scale.shape, block)
    if sizes is None:
        raise finder.misfit(scale_key, scale.shape)

    def make(parts: Parts, start: int, stop: int) -> Tensor:
        numbers = parts["numbers"].float()
        if "zeros" in parts:
            numbers = numbers - _spread(parts["zeros"].float(), shape, sizes, start, stop)
        return numbers * _spread(parts["scales"].float(), shape, sizes, start, stop)

    parts = {"numbers": key, "scales": scale_key}
    if zeros_key is not None:
        finder.require(finder.checkpoint.announced(zeros_key).shape == scale.shape, zeros_key)
        finder.require_kind(zeros_key, *kinds)
        parts["zeros"] = zeros_key
    return Group(shape=shape, parts=parts, by_entry=frozenset({"numbers"}), make=make)


def _block_sizes(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Any
) -> tuple[int, ...] | None:
    """How many entries of each axis share a scale; None where the scales do not fit."""
    if len(scales) < len(shape):  # of a tensor, or of each row
        scales = (*scales, *(1,) * (len(shape) - len(scales)))
    if len(scales) != len(shape):
        return None
    said = block if isinstance(block, list) and len(block) == 2 else (0, 0)
    wanted = (*(0,) * (len(shape) - 2), *said)
    sizes = []
    for size, count, asked in zip(shape, scales, wanted, strict=True):
        if count == 1:
            sizes.append(size)
        elif type(asked) is int and asked > 0 and -(-size // asked) == count:
            sizes.append(asked)
        elif count > 0 and size % count == 0:
            sizes.append(size // count)
        else:
            return None
    return tuple(sizes)


def _spread(
    scales: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...], start: int, stop: int
) -> Tensor:
    """The scale of every number in entries [start, stop)."""
    spread = scales.reshape(*scales.shape, *(1,) * (len(shape) - scales.ndim))
    for axis, size in enumerate(sizes):
        at = torch.arange(start, stop) if axis == 0 else torch.arange(shape[axis])
        spread = spread.index_select(axis, at // size)
    return spread


def mxfp4(finder: Finder) -> dict[str, Group]:
    """Stacked experts in 4-bit floats, two a byte, 32 to an exponent; inputs come first."""
    groups = {}
    for base, key in finder.ending("_blocks"):
        parts = finder.parts(base, blocks="_blocks", scales="_scales")
        count, rows, num_groups, num_bytes = finder.shape(key, 4)
        finder.require("scales" in parts and num_bytes == 16, key)
        scales = finder.shape(parts["scales"], 3)
        finder.require(scales == (count, rows, num_groups), parts["scales"])
        for part in parts.values():
            finder.require_kind(part, torch.uint8)
        groups[base] = Group(
            shape=(count, num_groups * 32, rows),
            parts=parts,
            by_entry=frozenset({"blocks", "scales"}),
            make=_from_mxfp4,
        )
    return groups


def _from_mxfp4(parts: Parts, start: int, stop: int) -> Tensor:
    values = torch.tensor([*_E2M1, *(-it for it in _E2M1)])
    blocks = parts["blocks"]
    numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
    scaled = torch.ldexp(numbers.flatten(-2), parts["scales"].int().unsqueeze(-1) - 127)
    return scaled.flatten(-2).transpose(1, 2)
