"""Attention of one sequence by torch's own operators, over keys and values that were read for it.

Knows tensors of one sequence: no blocks, no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.masks import Rule

if TYPE_CHECKING:
    from engine.attention import CallSettings

# Scores of soft-capped or sink attention are made explicitly; queries go through in slices such
# that one slice's scores stay below 64 MiB of float32, whatever the context.
MAX_SCORES: Final = 16 * 2**20


def attend_sequence(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Visible,
    settings: CallSettings,
    mask: Tensor | None,
) -> Tensor:
    """Attend from the last tokens of a sequence to what they see of it.

    Args:
        queries: (heads, n, key_size).
        keys: (kv_heads, s, key_size), of positions from the first that is seen to the last token.
        values: (kv_heads, s, value_size).
        visible: which of them each query sees, and
        mask: the same as (n, s) of 0 and -infinity; None where `settings` have a soft cap or sinks,
            where n is 1, and where the sequence is whole and every token sees all before it.
    Returns:
        (heads, n, value_size).
    """
    if settings.softcap is not None or settings.sinks is not None:
        return _attend_explicitly(queries, keys, values, visible, settings)
    if queries.shape[1] == 1:
        return _attend_from_one(queries, keys, values, settings.scale)
    return scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=settings.scale,
        enable_gqa=queries.shape[0] > keys.shape[0],
    )[0]


@dataclass(frozen=True, slots=True)
class Visible:
    """Which of the positions from `first` on each query from `start` on may see."""

    rule: Rule
    first: int
    start: int

    def mask(self, low: int, high: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean (high - low, num_keys): what queries low..high of the run see."""
        positions = torch.arange(self.start + low, self.start + high, device=device)
        others = torch.arange(self.first, self.first + num_keys, device=device)
        return self.rule.visible(positions[:, None], others[None, :])


def _attend_from_one(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A lone token sees all that was read. The heads that share keys become queries of one head:
    no keys are repeated."""
    heads, kv_heads = queries.shape[0], keys.shape[0]
    folded = queries.reshape(kv_heads, heads // kv_heads, -1)
    result = scaled_dot_product_attention(folded[None], keys[None], values[None], scale=scale)
    return result[0].reshape(heads, 1, -1)


def _attend_explicitly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Visible,
    settings: CallSettings,
) -> Tensor:
    """Attention with a soft cap or sinks, softmax in float32, in slices of queries.

    One sequence: queries (heads, n, key_size), keys and values (kv_heads, s, size); returns
    (heads, n, value_size).
    """
    scale, softcap, sinks = settings.scale, settings.softcap, settings.sinks
    heads, num_queries, _ = queries.shape
    kv_heads, num_keys, _ = keys.shape
    group = heads // kv_heads
    rows = max(1, MAX_SCORES // (heads * num_keys))
    parts = []
    for low in range(0, num_queries, rows):
        high = min(low + rows, num_queries)
        part = queries[:, low:high].reshape(kv_heads, group * (high - low), -1)
        scores = torch.matmul(part, keys.transpose(1, 2)) * scale
        scores = capped(scores, softcap).view(heads, high - low, num_keys).float()
        if num_queries > 1:  # a lone query sees all: the span was cut for its position
            mask = visible.mask(low, high, num_keys, queries.device)
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = softmax(scores, None if sinks is None else sinks.view(heads, 1, 1))
        weights = weights.to(values.dtype).view(kv_heads, group * (high - low), num_keys)
        parts.append(torch.matmul(weights, values).view(heads, high - low, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores that stay between -softcap and softcap."""
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of float32 scores (..., s); sinks, (..., 1), take a share that nobody gets."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float().expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
