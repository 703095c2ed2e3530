"""torch's operators for weights of 8 and 4 bits on a CPU, in the place of those of a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from engine.kernels.device_operators import Operators, Order, Tile

_aten = torch.ops.aten


def _operators(*tiles: Tile) -> Operators:
    return Operators(
        pack_int4=_aten._convert_weight_to_int4pack_for_cpu,
        matmul_int4=_aten._weight_int4pack_mm_for_cpu,
        matmul_int8=_aten._weight_int8pack_mm,
        two_in_a_byte=False,
        tiles=tiles,
        scales_like_tokens=True,
    )


def _tile() -> Tile:
    """What lies together depends on the processor: rows of one column, or columns of one row."""
    every = [Tile(1, 64, 1), Tile(1, 32, 1), Tile(1, 16, 1), Tile(1, 1, 2)]
    return next(
        it for it in every if Order.learnt(_operators(it), it, torch.device("cpu")) is not None
    )


CPU_TILE: Final = _tile()
CPU_OPERATORS: Final = _operators(CPU_TILE)


def like_a_gpu(inner: int) -> Operators:
    """A GPU's layout of int4, by plain torch: 8 rows of `inner` times 16 columns lie together.

    As int4mm.cu of torch describes it: a lane has a row and, of each pair of 16 columns, four times
    two neighbours, the first of all before the second of all.
    """

    def pack(given: Tensor, setting: int) -> Tensor:
        assert given.dtype == torch.uint8 and setting == inner and len(given) % 8 == 0
        # (eight rows, row, outer, pair, four, lane's column), two columns in each
        fours = given.view(len(given) // 8, 8, -1, inner // 2, 4, 4).permute(0, 2, 1, 5, 3, 4)
        nibbles = torch.cat([fours >> 4, fours & 15], dim=5)
        packed = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)
        return packed.view(len(given) // 8, -1, 32, inner // 2)

    def whole(data: Tensor) -> Tensor:
        assert data.dtype == torch.int32 and data.is_contiguous() and data.shape[2] == 32
        read = data.view(torch.uint8).view(len(data), -1, 8, 4, inner // 2, 4)
        nibbles = torch.stack([read & 15, read >> 4], dim=6).flatten(5)
        both = torch.stack([nibbles[..., :4], nibbles[..., 4:]], dim=6)  # (..., four, neighbour)
        return both.permute(0, 2, 1, 4, 5, 3, 6).reshape(len(data) * 8, -1)

    def matmul(x: Tensor, data: Tensor, group: int, scales: Tensor) -> Tensor:
        weights = whole(data).float()
        groups, rows, two = scales.shape
        assert x.dtype == scales.dtype == torch.bfloat16 and two == 2
        assert scales.is_contiguous() and x.is_contiguous()
        assert weights.shape == (rows, groups * group) and x.shape[1] == groups * group
        by_group = (weights - 8).view(rows, groups, group) * scales[:, :, 0].t()[..., None].float()
        by_group += scales[:, :, 1].t()[..., None].float()
        return (x.float() @ by_group.flatten(1).t()).bfloat16()

    tile = Tile(inner, 8, 16 * inner)
    return replace(
        CPU_OPERATORS, pack_int4=pack, matmul_int4=matmul, two_in_a_byte=True, tiles=(tile,)
    )


def forgetful(operators: Operators) -> Operators:
    """The same, but packing loses a bit."""

    def pack(whole: Tensor, inner: int) -> Tensor:
        return operators.pack_int4(whole & 14, inner)

    return replace(operators, pack_int4=pack)


def wrong(operators: Operators) -> Operators:
    """The same, but products are off by a tenth."""

    def int4(x: Tensor, data: Tensor, group: int, scales: Tensor) -> Tensor:
        return operators.matmul_int4(x, data, group, scales) * 1.1

    def int8(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
        return operators.matmul_int8(x, data, scales) * 1.1

    return replace(operators, matmul_int4=int4, matmul_int8=int8)


def missing(operators: Operators) -> Operators:
    """What torch says of a device that it has no such operator for."""

    def int4(x: Tensor, data: Tensor, group: int, scales: Tensor) -> Tensor:
        raise NotImplementedError("Could not run 'aten::_weight_int4pack_mm' on this device\nmore")

    def int8(x: Tensor, data: Tensor, scales: Tensor) -> Tensor:
        raise NotImplementedError("Could not run 'aten::_weight_int8pack_mm' on this device\nmore")

    return replace(operators, matmul_int4=int4, matmul_int8=int8)
