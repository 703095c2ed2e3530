"""Attention of those sequences of a step that have one token in it, for all of them at once.

On a GPU a call for each sequence and layer costs more than what it computes. Here the tables of all
sequences are one tensor, and keys and values are gathered for all of them as if they were equally
long; what a token does not see is masked, and never read. No shape depends on a length, and nothing
is asked back from the device, so the same calls can be recorded and played again
(`engine.decode_graphs`). Knows tensors, block tables and rules; no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kv import BLOCK_TOKENS, BlockCache, KvSpan, Site
from engine.masks import Rule
from engine.torch_attention import capped, softmax

if TYPE_CHECKING:
    from engine.attention import CallSettings, StageRun

# Tables are filled up to powers of two from here on: 256 tokens are gathered in no time.
FEWEST_BLOCKS: Final = 16
# Beyond 16,384 tokens each, copying keys and values together costs more than a call for each
# sequence, which reads them where they are: 2 x 64 MB of a usual layer against some six calls.
MOST_BLOCKS: Final = 1024
# Keys or values of one call that are gathered at a time, whatever batch and context.
GATHERED_BYTES: Final = 64 * 2**20


def table_blocks(num_blocks: int) -> int:
    """How many blocks a table of so many is filled up to."""
    return max(FEWEST_BLOCKS, 1 << (num_blocks - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Reach:
    """What the tokens of a group see under one rule."""

    rows: Tensor  # (tokens * width,) int64: the slots to gather, each token's own where it is less
    mask: Tensor  # (tokens, 1, 1, width) of 0 and -infinity, added to scores
    width: int


@dataclass(slots=True)
class Group:
    """Some of a step's tokens, with tables of one width."""

    places: Tensor | None  # (tokens,) int64: where in the step; None: all, in order
    positions: Tensor  # (tokens,) int64
    tables: Tensor  # (tokens, blocks) int64
    reaches: dict[Rule, Reach] = field(default_factory=dict)  # made once a step

    def slots(self, positions: Tensor) -> Tensor:
        """Where positions (tokens, n) of the sequences lie."""
        blocks = self.tables.gather(1, positions // BLOCK_TOKENS)
        return blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS

    def reach(self, rule: Rule, dtype: torch.dtype) -> Reach:
        """What these tokens see, worked out once a step."""
        known = self.reaches.get(rule)
        if known is None:
            known = self.reaches[rule] = self._reach(rule, dtype)
        return known

    def _reach(self, rule: Rule, dtype: torch.dtype) -> Reach:
        own = self.positions[:, None]
        width = self.tables.shape[1] * BLOCK_TOKENS
        if rule.kind != "full":
            width = min(width, rule.window)
        seen = _first_visible(rule, own) + torch.arange(width, device=own.device)
        mask = torch.zeros(seen.shape, dtype=dtype, device=own.device)
        mask.masked_fill_(seen > own, float("-inf"))
        # Beyond its own position a token reads its own: what lies there may be anybody's, NaN too.
        rows = self.slots(torch.minimum(seen, own))
        return Reach(rows.flatten(), mask[:, None, None], width)


class DecodeBatch:
    """One token of each of some sequences of a step."""

    def __init__(self, groups: Sequence[Group], positions: Tensor | None = None) -> None:
        """
        Args:
            groups: they hold each token once.
            positions: (tokens,) int64, in the step's order; None where others are in the step too.
        """
        self.positions, self._groups = positions, groups

    @classmethod
    def of_tables(cls, positions: Tensor, tables: Tensor) -> DecodeBatch:
        """All tokens of a step, with tables (tokens, blocks) of one width."""
        return cls([Group(None, positions, tables)], positions)

    def new_slots(self) -> Tensor:
        """Where the keys and values of a step of one group go: (tokens,) int64."""
        (group,) = self._groups
        return group.slots(group.positions[:, None])[:, 0]

    def attend(
        self,
        cache: BlockCache,
        site: Site,
        queries: Tensor,
        out: Tensor,
        rule: Rule,
        settings: CallSettings,
    ) -> None:
        """Attend from each token to its own sequence, whose keys and values are written.

        Args:
            queries: (all tokens of the step, heads, key_size), rotary already applied.
            out: (all tokens of the step, heads, value_size); only these tokens' rows are written.
        """
        for group in self._groups:
            if group.places is None:
                out.copy_(_attend(cache, site, queries, group, rule, settings))
                continue
            some = queries.index_select(0, group.places)
            result = _attend(cache, site, some, group, rule, settings)
            out.index_copy_(0, group.places, result)


def batch_of(runs: Sequence[StageRun], device: torch.device) -> DecodeBatch | None:
    """The lone tokens of a step, in groups of sequences of about one length; None: run by run."""
    rows = list(accumulate((run.num_tokens for run in runs), initial=0))
    lone = [(row, run) for row, run in zip(rows, runs, strict=False) if run.num_tokens == 1]
    if len(lone) < 2:
        return None
    widths = [table_blocks(run.start // BLOCK_TOKENS + 1) for _, run in lone]
    if sum(widths) > MOST_BLOCKS * len(lone):
        return None
    by_width: dict[int, list[tuple[int, StageRun]]] = {}
    for width, it in zip(widths, lone, strict=True):
        by_width.setdefault(width, []).append(it)
    is_all = len(lone) == len(runs)
    groups = []
    for width, members in by_width.items():
        places = None
        if not is_all or len(by_width) > 1:
            places = torch.tensor([row for row, _ in members]).to(device)
        positions = torch.tensor([run.start for _, run in members]).to(device)
        tables = filled_tables([run for _, run in members], width).to(device)
        groups.append(Group(places, positions, tables))
    if not is_all:
        return DecodeBatch(groups)
    return DecodeBatch(groups, torch.tensor([run.start for run in runs]).to(device))


def filled_tables(runs: Sequence[StageRun], width: int) -> Tensor:
    """The runs' block tables (runs, width) int64 on the CPU, filled up with what is never read."""
    tables = torch.zeros(len(runs), width, dtype=torch.int64)
    for row, run in zip(tables, runs, strict=True):
        used = run.blocks[: run.start // BLOCK_TOKENS + 1]
        row[: len(used)] = used
    return tables


def _attend(
    cache: BlockCache,
    site: Site,
    queries: Tensor,
    group: Group,
    rule: Rule,
    settings: CallSettings,
) -> Tensor:
    """Of one group: (tokens, heads, key_size) to (tokens, heads, value_size), contiguous."""
    reach = group.reach(rule, queries.dtype)
    keys, values = cache.tensors(site)
    row_bytes = max(keys[0].numel(), values[0].numel()) * keys.element_size()
    at_once = max(1, GATHERED_BYTES // (reach.width * row_bytes))
    parts = []
    for low in range(0, len(queries), at_once):
        some = queries[low : low + at_once]
        rows = reach.rows[low * reach.width : (low + len(some)) * reach.width]
        keys, values = cache.read(site, KvSpan(0, len(rows), rows))
        parts.append(
            _attend_gathered(
                some,
                torch.unflatten(keys, 0, (len(some), -1)).transpose(1, 2),
                torch.unflatten(values, 0, (len(some), -1)).transpose(1, 2),
                reach.mask[low : low + len(some)],
                settings,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, settings: CallSettings
) -> Tensor:
    """Queries (n, heads, key_size), keys and values (n, kv_heads, width, size).

    The heads that share keys become queries of one head: no keys are repeated.
    """
    count, heads, _ = queries.shape
    kv_heads = keys.shape[1]
    folded = queries.reshape(count, kv_heads, heads // kv_heads, -1)
    softcap, sinks = settings.softcap, settings.sinks
    if softcap is None and sinks is None:
        result = scaled_dot_product_attention(
            folded, keys, values, attn_mask=mask, scale=settings.scale
        )
        return result.reshape(count, heads, -1)
    scores = torch.matmul(folded, keys.transpose(2, 3)) * settings.scale
    scores = capped(scores, softcap).float() + mask
    weights = softmax(scores, None if sinks is None else sinks.view(1, kv_heads, -1, 1))
    return torch.matmul(weights.to(values.dtype), values).reshape(count, heads, -1)


def _first_visible(rule: Rule, positions: Tensor) -> Tensor:
    """`Rule.first_visible` of many positions."""
    if rule.kind == "sliding":
        return (positions - rule.window + 1).clamp_min(0)
    if rule.kind == "chunked":
        return positions // rule.window * rule.window
    return torch.zeros_like(positions)
