"""The packed layouts by torch alone: on other devices, and where nothing was compiled.

The same bytes as linear_pack.c makes, up to ties of rounding. Slow, and needs several times the
weight's memory while it packs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.kernels import packed_bf12

# Where the weight of largest magnitude of a group is tried to be put (linear_lanes.h).
_STEPS: Final = (-8.0, -7.0, -7.5, -8.5, -9.0, -9.5, 7.0, 7.5, 8.0)
_PACK_BYTES: Final = 64 * 2**20  # of float32 that are packed at a time


def pack(weight: Tensor, format: str, data: Tensor) -> None:
    """Pack (rows, cols) into `data`, uint8, on its device."""
    strips = -(-weight.shape[0] // 16)
    by_strip = data.view(strips, -1)
    at_once = max(1, _PACK_BYTES // (weight.shape[1] * 64))
    for start in range(0, strips, at_once):
        some = weight[start * 16 : (start + at_once) * 16].to(data.device)
        by_strip[start : start + at_once] = _PACKERS[format](some)


def unpack(data: Tensor, format: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """(rows, cols) that packed bytes stand for."""
    by_strip = data.view(-(-rows // 16), -1)
    return _UNPACKERS[format](by_strip, dtype).reshape(-(-rows // 16) * 16, -1)[:rows, :cols]


def _in_strips(weight: Tensor, cols: int) -> Tensor:
    """(strips, 16, columns), filled up with zeros."""
    padded = pad(weight, (0, -weight.shape[1] % cols, 0, -weight.shape[0] % 16))
    return padded.reshape(-1, 16, padded.shape[1])


def _pack_bf16(weight: Tensor) -> Tensor:
    strips = _in_strips(weight.to(torch.bfloat16), 32)
    pairs = torch.unflatten(strips, 2, (-1, 2)).transpose(1, 2)
    return pairs.contiguous().view(torch.uint8).flatten(1)


def _unpack_bf16(data: Tensor, dtype: torch.dtype) -> Tensor:
    pairs = torch.unflatten(data.contiguous().view(torch.bfloat16), 1, (-1, 16, 2))
    return pairs.transpose(1, 2).flatten(2).to(dtype)


def _pack_bf12(weight: Tensor) -> Tensor:
    return packed_bf12.pack(_pack_bf16(weight).cpu()).to(weight.device)


def _unpack_bf12(data: Tensor, dtype: torch.dtype) -> Tensor:
    return _unpack_bf16(packed_bf12.unpack(data.cpu()).to(data.device), dtype)


def _pack_int8(weight: Tensor) -> Tensor:
    strips = _in_strips(weight.float(), 64)
    largest = strips.abs().amax(2, keepdim=True)
    # Not 127 / largest: torch makes that 127 * (1 / largest), which rounds twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    whole = (torch.round(strips * inverse) + 128).to(torch.uint8)
    fours = torch.unflatten(whole, 2, (-1, 4)).transpose(1, 2).flatten(1)
    scales = (largest / 127.0).squeeze(2).contiguous().view(torch.uint8)
    return torch.cat([scales, fours], 1)


def _unpack_int8(data: Tensor, dtype: torch.dtype) -> Tensor:
    whole, scales = int8_parts(data)
    return ((whole.float() - 128) * scales[:, None]).to(dtype)


def int8_parts(data: Tensor) -> tuple[Tensor, Tensor]:
    """Of (strips, bytes): the numbers 1 to 255, (rows, cols) uint8, and the rows' scales, float32.

    A weight is (number - 128) * scale; rows and columns are filled up to whole strips and chunks.
    """
    scales = data[:, :64].contiguous().view(torch.float32)
    whole = torch.unflatten(data[:, 64:], 1, (-1, 16, 4)).transpose(1, 2)
    return whole.reshape(len(data) * 16, -1), scales.flatten()


def _pack_int4(weight: Tensor) -> Tensor:
    groups = torch.unflatten(_in_strips(weight.float(), 64), 2, (-1, 32))
    scale = _int4_scales(groups)
    inverse = torch.where(scale != 0, 1.0 / scale.float(), 0.0)
    whole = torch.round(groups * inverse[..., None]).clamp(-8, 7) + 8
    # (strip, row, chunk, eight, half of it, four)
    nibbles = whole.to(torch.uint8).reshape(len(groups), 16, -1, 8, 2, 4)
    both = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    weights = both.permute(0, 2, 3, 1, 4).flatten(2)
    pairs = torch.unflatten(scale, 2, (-1, 2)).permute(0, 2, 1, 3).contiguous()
    return torch.cat([pairs.view(torch.uint8).flatten(2), weights], 2).flatten(1)


def _int4_scales(groups: Tensor) -> Tensor:
    """(strip, row, group) bfloat16: of a few scales each, the one with the least squared error."""
    at = groups.abs().argmax(3, keepdim=True)
    extreme = groups.gather(3, at)
    extreme = torch.where(extreme == 0, 1.0, extreme)
    least = torch.full(groups.shape[:3], 3.0e38, device=groups.device)
    best = torch.zeros_like(least)
    for step in _STEPS:
        whole = torch.round(groups * (torch.full_like(extreme, step) / extreme)).clamp(-8, 7)
        norm, product = (whole * whole).sum(3), (whole * groups).sum(3)
        fit = product / torch.where(norm > 0, norm, 1.0)
        error = -fit * product
        best = torch.where(error < least, fit, best)
        least = torch.minimum(least, error)
    return best.to(torch.bfloat16)


def _unpack_int4(data: Tensor, dtype: torch.dtype) -> Tensor:
    whole, scales = int4_parts(data)
    groups = torch.unflatten(whole, 1, (-1, 32))
    return ((groups.float() - 8) * scales[..., None].float()).flatten(1).to(dtype)


def int4_parts(data: Tensor) -> tuple[Tensor, Tensor]:
    """Of (strips, bytes): the numbers 0 to 15, (rows, cols) uint8, and (rows, groups) bfloat16.

    A weight is (number - 8) * its group's scale; rows and columns are filled up to whole strips
    and chunks.
    """
    chunks = torch.unflatten(data, 1, (-1, 576))
    scales = torch.unflatten(chunks[..., :64].contiguous().view(torch.bfloat16), 2, (16, 2))
    both = torch.unflatten(chunks[..., 64:], 2, (8, 16, 4))
    whole = torch.stack([both & 15, both >> 4], 3)  # (strip, chunk, eight, half, row, four)
    rows = whole.permute(0, 4, 1, 2, 3, 5).reshape(len(data) * 16, -1)
    return rows, scales.permute(0, 2, 1, 3).reshape(len(rows), -1)


_PACKERS: Final = {"bf16": _pack_bf16, "bf12": _pack_bf12, "int8": _pack_int8, "int4": _pack_int4}
_UNPACKERS: Final = {
    "bf16": _unpack_bf16,
    "bf12": _unpack_bf12,
    "int8": _unpack_int8,
    "int4": _unpack_int4,
}
