"""Attention over KV blocks, called by transformers' own model code.

transformers hands every attention call to a function chosen by name. Ours writes the new keys
and values into the lease's blocks and attends to what each sequence has there, so one flat batch
of tokens may belong to many sequences at different positions. No mask tensor is made: causality
and windows follow from positions, by the rule that `engine.masks` learnt for each call. Knows no
architecture; that rule and what it is told per call (scale, soft cap, sinks) is all that differs
between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.kv import BlockCache, KvSpan, Site, SiteShape, span_of, token_slots
from engine.masks import FULL, MaskFunction, MaskNotes, Rule
from proto.errors import ModelUnfit

if TYPE_CHECKING:
    from engine.lora_layers import Adapter

ATTENTION_NAME: Final = "comboio"

# Scores of soft-capped or sink attention are made explicitly; queries go through in slices such
# that one slice's scores stay below 64 MiB of float32, whatever the context.
MAX_SCORES: Final = 16 * 2**20

# What model code passes along that changes nothing here: inference only, positions are known.
_WITHOUT_EFFECT: Final = frozenset(
    {
        "dropout",
        "position_ids",
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
        "deterministic",
        "head_mask",
        "num_items_in_batch",
        "logits_to_keep",
        "return_dict",
        "layer_idx",
        "target_dtype",
        "use_top_left_mask",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRun:
    """A contiguous stretch of one sequence inside a step."""

    start: int  # position of its first token
    num_tokens: int
    rope_length: int  # tables that depend on a length are made for max(this, position + 1)
    blocks: Tensor  # (num_blocks,) int64 on the CPU, covering [0, start + num_tokens)
    adapter: Adapter | None = None  # what is added to the model for this sequence

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + self.num_tokens


@dataclass(slots=True)
class StepContext:
    """What attention and rotary tables need to know of the step that is running."""

    runs: Sequence[StageRun]
    cache: BlockCache | None  # None: attention computes nothing
    device: torch.device
    slots: Tensor  # (tokens,) int64 on `device`: where new keys and values go
    rules: dict[Site, Rule] = field(default_factory=dict)  # what each attention call may see
    notes: MaskNotes | None = None  # only in the pass that learns `rules` and `shapes`
    layer: int = -1  # set by the layer slot that is running
    calls: int = 0  # attention calls seen in this layer
    shapes: dict[Site, SiteShape] = field(default_factory=dict)
    spans: dict[tuple[int, int], KvSpan] = field(default_factory=dict)

    def enter_layer(self, layer: int) -> None:
        """Note which layer's attention comes next."""
        self.layer, self.calls = layer, 0

    def span(self, run: int, first: int) -> KvSpan:
        """Slots of one run's sequence from position `first` to its end, worked out once a step."""
        known = self.spans.get((run, first))
        if known is None:
            it = self.runs[run]
            known = self.spans[run, first] = span_of(it.blocks, first, it.stop, self.device)
        return known


_running: StepContext | None = None


@contextmanager
def running(context: StepContext) -> Iterator[StepContext]:
    """Make `context` the step that attention works for.

    One process runs torch on one thread, so a module variable is enough and costs nothing.
    """
    global _running
    assert _running is None, "two steps at once"
    _running = context
    try:
        yield context
    finally:
        _running = None


def current() -> StepContext:
    """The step that is running."""
    assert _running is not None, "attention outside a step"
    return _running


def slots_of(runs: Sequence[StageRun], device: torch.device) -> Tensor:
    """Where the new keys and values of a step go: (tokens,) int64."""
    parts = [token_slots(run.blocks, run.start, run.stop) for run in runs]
    return torch.cat(parts).to(device)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from the step's tokens to their own sequences' blocks.

    Args:
        query: (1, heads, tokens, key_size), rotary already applied.
        key: (1, kv_heads, tokens, key_size).
        value: (1, kv_heads, tokens, value_size).
        sliding_window: how many positions back a token sees, itself included; only heard where
            the model makes no mask.
        softcap: scores s become softcap * tanh(s / softcap) (Gemma 2, arXiv:2408.00118).
        s_aux: (heads,) logits of attention sinks, which take part in the softmax only.
    Returns:
        (1, tokens, heads, value_size), and no weights.
    Raises:
        ModelUnfit: the model asks for something that this attention does not do.
    """
    step = current()
    site = (step.layer, step.calls)
    if step.notes is not None:
        rule = FULL if not sliding_window else Rule("sliding", sliding_window)
        if attention_mask is not None:
            rule = step.notes.rule(attention_mask) or _refuse_mask(module)
        step.rules[site] = rule
    elif attention_mask is not None:
        _refuse_mask(module)
    _refuse_unknown(module, others)
    step.calls += 1
    keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    queries = query[0]
    num_tokens, value_size = keys.shape[0], values.shape[2]
    if step.cache is None:
        step.shapes[site] = SiteShape(keys.shape[1], keys.shape[2], value_size)
        shape = (1, num_tokens, queries.shape[0], value_size)
        return query.new_zeros(shape), None
    step.cache.write(site, step.slots, keys, values)
    rule = step.rules[site]
    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    out = query.new_empty(num_tokens, queries.shape[0], value_size)
    row = 0
    for number, run in enumerate(step.runs):
        first = rule.first_visible(run.start)
        past_keys, past_values = step.cache.read(site, step.span(number, first))
        result = _attend(
            queries[:, row : row + run.num_tokens],
            past_keys.transpose(0, 1),
            past_values.transpose(0, 1),
            visible=_Visible(rule, first, run.start),
            scale=scale,
            softcap=softcap,
            sinks=s_aux,
        )
        out[row : row + run.num_tokens] = result.transpose(0, 1)
        row += run.num_tokens
    return out.unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class _Visible:
    """Which of the positions from `first` on each query from `start` on may see."""

    rule: Rule
    first: int
    start: int

    def mask(self, low: int, high: int, num_keys: int, device: torch.device) -> Tensor:
        """Boolean (high - low, num_keys): what queries low..high of the run see."""
        positions = torch.arange(self.start + low, self.start + high, device=device)
        others = torch.arange(self.first, self.first + num_keys, device=device)
        return self.rule.visible(positions[:, None], others[None, :])


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    visible: _Visible,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: queries (heads, n, key_size), keys and values (kv_heads, s, size).

    Returns (heads, n, value_size).
    """
    if softcap is not None or sinks is not None:
        return _attend_explicitly(queries, keys, values, visible, scale, softcap, sinks)
    heads, num_queries, _ = queries.shape
    kv_heads, num_keys, _ = keys.shape
    group = heads // kv_heads
    if num_queries == 1:
        # The heads that share keys become queries of one head: no keys are repeated.
        folded = queries.view(kv_heads, group, -1)
        result = scaled_dot_product_attention(folded[None], keys[None], values[None], scale=scale)
        return result[0].reshape(heads, 1, -1)
    whole = num_keys == num_queries and visible.rule == FULL
    mask = None if whole else visible.mask(0, num_queries, num_keys, queries.device)
    result = scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=whole,
        scale=scale,
        enable_gqa=group > 1,
    )
    return result[0]


def _attend_explicitly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: _Visible,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft cap or sinks, softmax in float32, in slices of queries."""
    heads, num_queries, _ = queries.shape
    kv_heads, num_keys, _ = keys.shape
    group = heads // kv_heads
    rows = max(1, MAX_SCORES // (heads * num_keys))
    parts = []
    for low in range(0, num_queries, rows):
        high = min(low + rows, num_queries)
        part = queries[:, low:high].reshape(kv_heads, group * (high - low), -1)
        scores = torch.matmul(part, keys.transpose(1, 2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(heads, high - low, num_keys).float()
        if num_queries > 1:  # a lone query sees all: the span was cut for its position
            mask = visible.mask(low, high, num_keys, queries.device)
            scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sink = sinks.float().view(heads, 1, 1).expand(heads, high - low, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        weights = weights.to(values.dtype).view(kv_heads, group * (high - low), num_keys)
        parts.append(torch.matmul(weights, values).view(heads, high - low, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _refuse_mask(module: nn.Module) -> NoReturn:
    raise ModelUnfit(
        f"{type(module).__name__} makes an attention mask of its own, "
        "which attention over KV blocks does not support: this architecture cannot be split"
    )


def _refuse_unknown(module: nn.Module, others: dict[str, Any]) -> None:
    """Raise when a call carries something that would change the result and is not done here."""
    if others.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ModelUnfit(
            f"{type(module).__name__} attends to later tokens too: "
            "only causal decoders can be split"
        )
    for name, value in others.items():
        if value is not None and name not in _WITHOUT_EFFECT and isinstance(value, Tensor):
            raise ModelUnfit(
                f"{type(module).__name__} passes {name!r} to its attention, "
                "which attention over KV blocks does not support: this architecture cannot be split"
            )


def block_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_others: Any,
) -> Tensor | None:
    """Registered as transformers' mask function: positions say it all, no tensor is made.

    Only a pass that learns gets a marker, which tells its attention calls what they may see.

    Raises:
        ModelUnfit: the model combines the causal mask with a rule of its own.
    """
    if use_vmap:
        raise ModelUnfit(
            "this architecture combines the causal mask with a rule of its own, "
            "which attention over KV blocks does not support: it cannot be split"
        )
    notes = current().notes
    if notes is None:
        return None
    return notes.marker(mask_function, local_size, (batch_size, 1, q_length, kv_length))


def register() -> None:
    """Make the attention and mask functions known to transformers under ATTENTION_NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, block_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, block_mask)
