"""Apply rotary positions (arXiv:2104.09864) to queries and keys, in each of the ways in use.

Two numbers of a head are turned together: the first of each half, or neighbours. Tables come as
wide as what they turn, or half as wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from engine.kernels import pointwise

Tables = tuple[Tensor, Tensor]  # cosines and sines, (1, tokens, size) each
# Queries and keys, (tokens, heads, size) each, to the same; the given ones may be written over.
Turn = Callable[[Tensor, Tensor, Tables], tuple[Tensor, Tensor]]


def turn_halves(query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Number i of the first half with number i of the second; tables as wide as both."""
    pointwise.rope(query, key, tables[0][0], tables[1][0])
    return query, key


def turn_halves_by_half(query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The same, where the tables have one entry for two numbers."""
    cos, sin = (torch.cat([it[0], it[0]], dim=-1) for it in tables)
    pointwise.rope(query, key, cos, sin)
    return query, key


def turn_pairs(query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Neighbours; tables have the same number for both."""
    cos, sin = (it[0, :, None] for it in tables)
    return _pairs(query, cos, sin), _pairs(key, cos, sin)


def turn_pairs_by_half(query: Tensor, key: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Neighbours; the tables' first half has the numbers, one for two."""
    half = tables[0].shape[-1] // 2
    cos, sin = (it[0, :, None, :half].repeat_interleave(2, dim=-1) for it in tables)
    return _pairs(query, cos, sin), _pairs(key, cos, sin)


TURNS: Final[tuple[Turn, ...]] = (turn_halves, turn_halves_by_half, turn_pairs, turn_pairs_by_half)


def _pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    crossed = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    # As the models do: some compute this in float32, which the caller's comparison lets pass.
    result = (turned * cos + crossed * sin).to(heads.dtype)
    return result if not rest.shape[-1] else torch.cat([result, rest], dim=-1)
