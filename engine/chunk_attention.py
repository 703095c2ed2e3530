"""Attention of a stretch of a prompt to what came before it, on a GPU, without large masks.

torch's flash attention takes no mask, and its memory-efficient one no shared heads; given both,
torch writes all scores into memory, for each head. So a stretch that sees everything before it is
said to end where its keys end, which flash attention knows; and under a window, heads that share
keys become queries of one head. Each is tried against torch's plain way the first time that its
shapes come, which is while a stage checks itself, and left out where it gives something else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.foreign_code import first_line
from engine.lean.agreement import agrees

log = logging.getLogger("comboio.engine")

# Whether the quick way agrees, by what it depends on.
_agreeing: dict[tuple[object, ...], bool] = {}


def attend_chunk(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Callable[[], Tensor],
    scale: float,
    *,
    sees_all: bool,
) -> Tensor:
    """Attend from the last n of s positions.

    Args:
        queries: (heads, n, key_size).
        keys: (kv_heads, s, key_size), of any strides, as are
        values: (kv_heads, s, value_size).
        mask: gives what is added to scores, (n, s).
        sees_all: each query sees all positions up to its own.
    Returns:
        (heads, n, value_size).
    """
    way = by_end if sees_all else by_folding
    shapes = queries.shape[0], queries.shape[2], *keys.shape[::2], values.shape[2]
    key = way, queries.dtype, queries.device, *shapes
    if key not in _agreeing:
        expected = plainly(queries, keys, values, mask(), scale)
        if bool(torch.isfinite(expected).all()):  # or nothing can be told from it
            _agreeing[key] = _try(partial(way, queries, keys, values, mask(), scale), expected)
        return expected
    if not _agreeing[key]:
        return plainly(queries, keys, values, mask(), scale)
    # The mask of one that sees all is not even made.
    return way(queries, keys, values, queries if sees_all else mask(), scale)


def plainly(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """With a mask, as torch sees fit."""
    return scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=queries.shape[0] > keys.shape[0],
    )[0]


def by_end(queries: Tensor, keys: Tensor, values: Tensor, _mask: Tensor, scale: float) -> Tensor:
    """Queries end where keys end: the last one sees all."""
    # It takes two seconds to import, which a worker on a CPU has no use for.
    from torch.nn.attention.bias import causal_lower_right

    return scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=causal_lower_right(queries.shape[1], keys.shape[1]),
        scale=scale,
        enable_gqa=queries.shape[0] > keys.shape[0],
    )[0]


def by_folding(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Heads that share keys become queries of one."""
    heads, count, _ = queries.shape
    kv_heads = keys.shape[0]
    shared = heads // kv_heads
    folded = queries.reshape(kv_heads, shared * count, -1)
    result = scaled_dot_product_attention(
        folded[None], keys[None], values[None], attn_mask=mask.repeat(shared, 1), scale=scale
    )
    return result[0].reshape(heads, count, -1)


def _try(way: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        why = None if agrees(way(), expected) else "other numbers"
    except Exception as exc:  # whatever torch raises on a device that lacks something
        why = first_line(exc)
    if why is not None:
        log.warning("long prompts are attended with masks on this device: %s", why)
    return why is None
