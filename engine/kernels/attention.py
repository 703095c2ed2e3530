"""Attention straight over KV blocks, by the compiled kernels, for runs of a few tokens.

What holds for a whole step and what holds for every call of a site is packed once, as the
structures of attention.h; a call then hands over addresses alone. Keys and values of all runs are
written before any is read. The caller keeps a torch path: for long runs, and where `pack_site`
gives None.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.native import DTYPES, INT8
from engine.masks import Rule

# A longer run has enough tokens for torch's matrix multiplications to be the faster way.
MAX_RUN_TOKENS: Final = 16

_RULES: Final = {"full": 0, "sliding": 1, "chunked": 2}
_SITE: Final = struct.Struct("=13q2d")


@dataclass(frozen=True, slots=True)
class Memory:
    """Keys and values of one site."""

    keys: Tensor  # (slots, kv_heads, key_size), contiguous, as are
    values: Tensor  # (slots, kv_heads, value_size), and
    # (blocks, kv_heads, tokens of a block) bfloat16 of both, where they are int8.
    scales: tuple[Tensor, Tensor] | None


def can_attend(device: torch.device) -> bool:
    """Whether there are kernels for tensors of that device."""
    return native.library is not None and device.type == "cpu"


def pack_site(
    memory: Memory,
    dtype: torch.dtype,
    heads: int,
    rule: Rule,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> bytes | None:
    """What holds for every call of a site; None where the kernels have no such types.

    Args:
        memory: where keys and values are; must outlive the result, as must
        sinks: (heads,) float32, contiguous.
        dtype: of queries, new keys and new values.
    """
    keys, values, scales = memory.keys, memory.values, memory.scales
    known = DTYPES.get(dtype)
    if known is None or heads % keys.shape[1]:
        return None
    assert keys.dtype == values.dtype == (dtype if scales is None else torch.int8)
    return _SITE.pack(
        keys.data_ptr(),
        values.data_ptr(),
        0 if scales is None else scales[0].data_ptr(),
        0 if scales is None else scales[1].data_ptr(),
        known,
        known if scales is None else INT8,
        heads,
        keys.shape[1],
        keys.shape[2],
        values.shape[2],
        _RULES[rule.kind],
        rule.window,
        0 if sinks is None else sinks.data_ptr(),
        scale,
        softcap or 0.0,
    )


def pack_step(runs: Iterable[tuple[int, int, Tensor]]) -> bytes:
    """Which tokens a step has: (position of the first, how many, block table) of each run.

    The tables, int64 on the CPU, are taken at their word.
    """
    numbers, tables = [0], []
    row = place = 0
    for start, num_tokens, blocks in runs:
        numbers += row, num_tokens, start, place, num_tokens <= MAX_RUN_TOKENS
        tables.append(blocks.numpy().tobytes())
        row += num_tokens
        place += len(blocks)
    numbers[0] = len(tables)
    return struct.pack(f"={len(numbers)}q", *numbers) + b"".join(tables)


def attend(
    step: bytes, site: bytes, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    """Write a step's keys and values into their slots, and attend from its short runs.

    Args:
        step: from `pack_step`.
        site: from `pack_site`; of its type are
        queries: (tokens, heads, key_size), of any strides, as are
        keys: (tokens, kv_heads, key_size), and
        values: (tokens, kv_heads, value_size).
        out: (tokens, heads, value_size), contiguous; rows of long runs are left as they were.
    """
    query_token, query_head, inner = queries.stride()
    if inner != 1:
        queries = queries.contiguous()
        query_token, query_head, _ = queries.stride()
    key_token, key_head, inner = keys.stride()
    if inner != 1:
        keys = keys.contiguous()
        key_token, key_head, _ = keys.stride()
    value_token, value_head, inner = values.stride()
    if inner != 1:
        values = values.contiguous()
        value_token, value_head, _ = values.stride()
    out_token, out_head, _ = out.stride()
    native.library.attend(
        step,
        site,
        queries.data_ptr(),
        query_token,
        query_head,
        keys.data_ptr(),
        key_token,
        key_head,
        values.data_ptr(),
        value_token,
        value_head,
        out.data_ptr(),
        out_token,
        out_head,
    )
