"""torch's operators for weights of 8 and 4 bits on a device, and the order they keep 4 bits in.

What order an operator has its numbers in is asked of the operator: tiles are packed whose numbers
say where they are from. So weights can be widened again that only the operator can read. Knows no
matrix of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """What of a matrix lies together in int4 under one setting of the operator."""

    inner: int  # the operator's setting ("inner k tiles")
    rows: int
    cols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """torch's operators for one kind of device, and what they ask for."""

    pack_int4: Callable[[Tensor, int], Tensor]  # whole numbers, setting -> an order of its own
    matmul_int4: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    matmul_int8: Callable[[Tensor, Tensor, Tensor], Tensor]
    two_in_a_byte: bool  # how `pack_int4` takes numbers: the first in the upper half, or int32
    tiles: tuple[Tile, ...]  # the best first
    scales_like_tokens: bool  # of which type int8 has its scales; else float32


def _cuda() -> Operators:
    aten = torch.ops.aten
    return Operators(
        pack_int4=aten._convert_weight_to_int4pack,
        matmul_int4=aten._weight_int4pack_mm,
        matmul_int8=aten._weight_int8pack_mm,
        two_in_a_byte=True,
        # A tile is 8 rows of `inner` times 16 columns; more of them are read at a time.
        tiles=tuple(Tile(inner, 8, 16 * inner) for inner in (8, 4, 2)),
        scales_like_tokens=False,
    )


def operators_of(device: torch.device) -> Operators | None:
    """What torch has for a device; None where nothing is known of it."""
    return _cuda() if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Order:
    """Where each number of a tile lies in what an operator made of the tile."""

    tile: Tile
    places: Tensor  # (rows * cols,) int64: of each number of the tile, row by row

    @classmethod
    def learnt(cls, operators: Operators, tile: Tile, device: torch.device) -> Order | None:
        """Ask the operator; None where a tile does not lie together, or numbers get lost."""
        numbers = torch.arange(tile.rows * tile.cols, device=device)
        # Two tiles each way, all alike, of at least what any device's operator accepts.
        down, across = max(2, 64 // tile.rows), max(2, 64 // tile.cols)
        grid = numbers.view(tile.rows, tile.cols).repeat(down, across)
        found = torch.zeros(down * across, len(numbers), dtype=torch.int64, device=device)
        for shift in (0, 4, 8):
            digit = packed_by(operators, (grid >> shift & 15).to(torch.uint8), tile)
            if digit.numel() * digit.element_size() * 2 != found.numel():
                return None
            found += _halves(digit).view(found.shape).long() << shift
        if not (torch.equal(found, found[:1].expand_as(found))):
            return None
        if not torch.equal(found[0].sort().values, numbers):
            return None
        return cls(tile, found[0].argsort())

    def rows_of(self, data: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """The whole numbers 0 to 15, (rows, cols), of the tiles that hold `rows` rows."""
        tile = self.tile
        tiles = _halves(data).view(rows // tile.rows, -1, tile.rows * tile.cols)
        sorted_out = tiles.index_select(2, self.places).to(dtype)
        by_row = sorted_out.view(*tiles.shape[:2], tile.rows, tile.cols).transpose(1, 2)
        return by_row.reshape(rows, -1)


def packed_by(operators: Operators, whole: Tensor, tile: Tile) -> Tensor:
    """(rows, cols) uint8 of 0 to 15 in whole tiles, as the operator orders them."""
    if operators.two_in_a_byte:
        given = (whole[:, ::2] << 4 | whole[:, 1::2]).contiguous()
    else:
        given = whole.to(torch.int32)
    return operators.pack_int4(given, tile.inner)


def _halves(data: Tensor) -> Tensor:
    """Of every byte its lower and upper half, one behind the other, uint8."""
    read = data.contiguous().view(torch.uint8)
    return torch.stack([read & 15, read >> 4], dim=-1).flatten()
