"""The layout bf12 (linear_bf12.h) by torch alone: bfloat16 in 12 bits, exactly.

Works on bfloat16's strips, as `engine.kernels.packed_torch` makes and reads them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

_HEAD_BYTES: Final = 64
_GROUP_BYTES: Final = 192
_GROUPS: Final = 4  # in a chunk of 32 columns
_LINE_BYTES: Final = 64
_LISTED: Final = np.dtype([("at", "<u4"), ("bits", "<u2"), ("unused", "<u2")])


def list_room(chunks: int) -> int:
    """How many weights a strip of so many chunks can list."""
    return 2 * chunks + 8


def strip_bytes(chunks: int) -> int:
    """What a strip of so many chunks takes: head, groups, and the list in whole lines."""
    lines = -(-list_room(chunks) * _LISTED.itemsize // _LINE_BYTES)
    return _HEAD_BYTES + chunks * _GROUPS * _GROUP_BYTES + lines * _LINE_BYTES


class DoesNotFit(ValueError):
    """These weights have too many high bytes to be held in bf12."""


def pack(strips: Tensor) -> Tensor:
    """bfloat16's strips (strips, bytes) as those of bf12.

    Raises:
        DoesNotFit: in one strip more weights would have to be listed than there is room for.
    """
    words = _by_code(strips)
    high, low = words >> 8, (words & 255).to(torch.uint8)
    magnitude = high & 127
    top, count = _chosen(magnitude)
    below = top - magnitude
    has_code = (below >= 0) & (below < count)
    has_code |= (count == 7) & (magnitude == 0)
    code = torch.where((below >= 0) & (below < count), below, 7) | (high >> 7) << 3
    codes = (code[:, :, 0] | code[:, :, 1] << 4).to(torch.uint8)
    groups = torch.cat([codes, low[:, :, 0], low[:, :, 1]], 2).flatten(1)
    chunks = groups.shape[1] // (_GROUPS * _GROUP_BYTES)
    room = list_room(chunks)
    steps = torch.arange(8)
    said = torch.where(steps < count.view(-1, 1), top.view(-1, 1) - steps, 0)
    heads = np.zeros((len(strips), _HEAD_BYTES), np.uint8)
    heads[:, :16] = torch.cat([said, said | 128], 1).to(torch.uint8).numpy()
    list_bytes = strip_bytes(chunks) - _HEAD_BYTES - groups.shape[1]
    lists = np.zeros((len(strips), list_bytes // _LISTED.itemsize), _LISTED)
    for strip in (~has_code).flatten(1).any(1).nonzero().flatten().tolist():
        group, place = _places(torch.nonzero(~has_code[strip], as_tuple=True))
        if len(place) > room:
            raise DoesNotFit(f"{len(place)} of a strip's weights have high bytes of their own")
        pair = group * _GROUPS + place // 32
        lists[strip]["at"][: len(place)] = (pair * 2 + place % 2) * 16 + place % 32 // 2
        lists[strip]["bits"][: len(place)] = words[strip][~has_code[strip]].numpy()
        heads[strip, 16:20] = np.array([len(place)], "<u4").view(np.uint8)
    return torch.cat(
        [
            torch.from_numpy(heads),
            groups,
            torch.from_numpy(lists.view(np.uint8).reshape(len(strips), -1)),
        ],
        1,
    )


def unpack(data: Tensor) -> Tensor:
    """bf12's strips (strips, bytes) as bfloat16's."""
    chunks = data.shape[1] // (_GROUPS * _GROUP_BYTES)
    while strip_bytes(chunks) > data.shape[1]:
        chunks -= 1
    end = _HEAD_BYTES + chunks * _GROUPS * _GROUP_BYTES
    groups = torch.unflatten(data[:, _HEAD_BYTES:end], 1, (-1, 3, 64)).int()
    codes = torch.stack([groups[:, :, 0] & 15, groups[:, :, 0] >> 4], 2)
    table = data[:, :16].int()
    high = table.gather(1, codes.flatten(1).long()).view_as(codes)
    words = high << 8 | groups[:, :, 1:]
    lines = torch.unflatten(words, 3, (4, 2, 8)).transpose(3, 4).flatten(1)
    heads, lists = data[:, :_HEAD_BYTES].numpy(), data[:, end:].contiguous().numpy()
    for strip, count in enumerate(heads[:, 16:20].copy().view("<u4").flatten().tolist()):
        listed = lists[strip].view(_LISTED)[: count if count <= list_room(chunks) else 0]
        listed = listed[listed["at"] < chunks * 32 * 16]
        column, row = listed["at"] // 16, listed["at"] % 16
        at = torch.from_numpy((column // 2 * 32 + 2 * row + column % 2).astype(np.int64))
        lines[strip, at] = torch.from_numpy(listed["bits"].astype(np.int32))
    made: Tensor = lines.to(torch.uint16).view(torch.uint8)
    return made


def _by_code(strips: Tensor) -> Tensor:
    """(strips, groups, 2, 64) the bits of the weights, in the order of their codes."""
    words = torch.unflatten(strips.contiguous().view(torch.uint16).int(), 1, (-1, 2, 2, 4, 8))
    return words.transpose(3, 4).flatten(3)


def _chosen(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """For each strip, (strips, 1, 1, 1): the largest high byte that has a code, and how many."""
    flat = magnitude.flatten(1).long()
    seen = torch.zeros(len(flat), 128, dtype=torch.int64).scatter_add_(
        1, flat, torch.ones_like(flat)
    )
    windows = seen.unfold(1, 8, 1).sum(2)  # from 0 to 7, from 1 to 8, ...
    with_zero = windows - seen[:, :-7] + seen[:, :1]
    with_zero[:, 0] = 0
    most, best = windows.max(1)
    most_with_zero, best_with_zero = with_zero.max(1)
    is_with_zero = most_with_zero > most
    top = 7 + torch.where(is_with_zero, best_with_zero, best)
    count = torch.where(is_with_zero, 7, 8)
    return top.view(-1, 1, 1, 1), count.view(-1, 1, 1, 1)


def _places(where: tuple[Tensor, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The groups, and the places among a group's 128 bf16, of weights given by `_by_code`."""
    group, pair, code = (it.numpy() for it in where)
    return group, pair * 64 + code % 16 // 8 * 32 + code // 16 * 8 + code % 8
