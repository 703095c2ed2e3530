"""Attention over KV blocks, called by transformers' own model code.

transformers hands every attention call to a function chosen by name. Ours writes the new keys
and values into the lease's blocks and attends to what each sequence has there, so one flat batch
of tokens may belong to many sequences at different positions. Runs of a few tokens are attended by
`engine.kernels`, straight over the blocks; long ones, and all where there are no kernels, by torch
(`engine.torch_attention`).
Causality and windows follow from positions, by the rule that `engine.masks` learnt for each call.
Knows no architecture; that rule and what it is told per call (scale, soft cap, sinks) is all that
differs between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn

from engine.chunk_attention import attend_chunk
from engine.kernels import attention as kernels
from engine.kv import BlockCache, KvSpan, Site, SiteShape, span_of, token_slots
from engine.masks import FULL, MaskFunction, MaskNotes, Rule
from engine.torch_attention import Visible, attend_sequence
from proto.errors import ModelUnfit

if TYPE_CHECKING:
    from engine.decode_batch import DecodeBatch
    from engine.lora_layers import Adapter

ATTENTION_NAME: Final = "comboio"

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


@dataclass(frozen=True, slots=True, eq=False)
class CallSettings:
    """What a model tells its attention of one site, besides queries, keys and values."""

    scale: float  # of the scores
    softcap: float | None = None  # scores s become softcap * tanh(s / softcap)
    sinks: Tensor | None = None  # (heads,) logits that take part in the softmax only

    def same_as(self, other: CallSettings) -> bool:
        """Whether they say the same; sinks are compared by identity."""
        return (
            self.scale == other.scale
            and self.softcap == other.softcap
            and self.sinks is other.sinks
        )

    def of(self, heads: slice) -> CallSettings:
        """The same for some of the heads."""
        if self.sinks is None:
            return self
        return CallSettings(self.scale, self.softcap, self.sinks[heads])


@dataclass(slots=True)
class StepContext:
    """What attention and rotary tables need to know of the step that is running.

    What is the same for all layers is worked out once, when the first of them asks.
    """

    runs: Sequence[StageRun]
    cache: BlockCache | None  # None: attention computes nothing
    device: torch.device
    slots: Tensor | None = None  # (tokens,) int64 on `device`: where new keys and values go
    rules: dict[Site, Rule] = field(default_factory=dict)  # what each attention call may see
    plainly: bool = False  # layers run as transformers has them, not in their lean form
    notes: MaskNotes | None = None  # only in the pass that learns `rules` and `shapes`
    layer: int = -1  # set by the layer slot that is running
    calls: int = 0  # attention calls seen in this layer
    shapes: dict[Site, SiteShape] = field(default_factory=dict)
    spans: dict[tuple[int, int], KvSpan] = field(default_factory=dict)
    masks: dict[tuple[int, Rule], Tensor] = field(default_factory=dict)
    packed: bytes | None = None  # the runs, as the kernels read them
    batch: DecodeBatch | None = None  # the runs of one token, where they are attended at once

    def enter_layer(self, layer: int) -> None:
        """Note which layer's attention comes next."""
        self.layer, self.calls = layer, 0

    def next_site(self) -> Site:
        """Which attention call this is."""
        site = (self.layer, self.calls)
        self.calls += 1
        return site

    def span(self, run: int, first: int) -> KvSpan:
        """Slots of one run's sequence from position `first` to its end, worked out once a step."""
        known = self.spans.get((run, first))
        if known is None:
            it = self.runs[run]
            known = self.spans[run, first] = span_of(it.blocks, first, it.stop, self.device)
        return known

    def mask(self, run: int, rule: Rule, dtype: torch.dtype) -> Tensor:
        """What a run's tokens see from the first visible position on, as what is added to scores.

        (num_tokens, positions) of 0 and -infinity, made once a step.
        """
        known = self.masks.get((run, rule))
        if known is None:
            it = self.runs[run]
            visible = Visible(rule, rule.first_visible(it.start), it.start)
            seen = visible.mask(0, it.num_tokens, it.stop - visible.first, self.device)
            known = torch.zeros(seen.shape, dtype=dtype, device=self.device)
            known.masked_fill_(~seen, float("-inf"))
            self.masks[run, rule] = known
        return known

    def new_slots(self) -> Tensor:
        """Where the step's keys and values go: (tokens,) int64."""
        if self.slots is None:
            self.slots = slots_of(self.runs, self.device)
        return self.slots

    def packed_runs(self) -> bytes:
        """The runs as the kernels read them."""
        if self.packed is None:
            self.packed = kernels.pack_step(
                [(run.start, run.num_tokens, run.blocks) for run in self.runs]
            )
        return self.packed


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
    if step.notes is not None:
        rule = FULL if not sliding_window else Rule("sliding", sliding_window)
        if attention_mask is not None:
            rule = step.notes.rule(attention_mask) or _refuse_mask(module)
        step.rules[step.layer, step.calls] = rule
    elif attention_mask is not None:
        _refuse_mask(module)
    if others:
        _refuse_unknown(module, others)
    elif getattr(module, "is_causal", True) is False:
        _refuse_unknown(module, {"is_causal": False})
    settings = call_settings(query, scaling=scaling, softcap=softcap, s_aux=s_aux)
    out = attend(
        step,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        settings,
    )
    return out.unsqueeze(0), None


def call_settings(
    query: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_others: Any,
) -> CallSettings:
    """What a call of `block_attention` says of its site."""
    return CallSettings(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)


def attend(
    step: StepContext, queries: Tensor, keys: Tensor, values: Tensor, settings: CallSettings
) -> Tensor:
    """Attend from the step's tokens to their own sequences' blocks; the step's next call.

    Args:
        queries: (tokens, heads, key_size), rotary already applied, of any strides, as are
        keys: (tokens, kv_heads, key_size), and
        values: (tokens, kv_heads, value_size).
        settings: the same object at every step saves a comparison.
    Returns:
        (tokens, heads, value_size), contiguous.
    """
    site = step.next_site()
    num_tokens, kv_heads, value_size = values.shape
    out = queries.new_empty(num_tokens, queries.shape[1], value_size)
    cache = step.cache
    if cache is None:
        step.shapes[site] = SiteShape(kv_heads, keys.shape[2], value_size)
        return out.zero_()
    rule = step.rules[site]
    by_kernels = (
        step.batch is None
        and kernels.can_attend(step.device)
        and _attend_short(step, site, queries, keys, values, out, rule, settings)
    )
    if not by_kernels:
        cache.write(site, step.new_slots(), keys, values)
    fewest, row = 1, 0  # tokens of a run that is left to do, and the first of its rows
    if step.batch is not None:
        step.batch.attend(cache, site, queries, out, rule, settings)
        fewest = 2
    elif by_kernels:
        fewest = kernels.MAX_RUN_TOKENS + 1
    for number, run in enumerate(step.runs):
        if run.num_tokens >= fewest:
            _attend_run(
                step,
                site,
                number,
                queries[row : row + run.num_tokens].transpose(0, 1),
                out[row : row + run.num_tokens],
                rule,
                settings,
            )
        row += run.num_tokens
    return out


def _attend_short(
    step: StepContext,
    site: Site,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    rule: Rule,
    settings: CallSettings,
) -> bool:
    """Write all keys and values, and attend from the runs of a few tokens; False: none of it.

    What the kernels are told of the site stays with the cache, whose memory it names.
    """
    cache = step.cache
    assert cache is not None
    known = cache.told.get(site)
    if known is None or not (known.settings is settings or known.settings.same_as(settings)):
        known = cache.told[site] = _tell(cache, site, queries.shape[1], rule, settings)
    if known.packed is None or queries.dtype != cache.dtype or keys.dtype != values.dtype:
        return False
    kernels.attend(step.packed_runs(), known.packed, queries, keys, values, out)
    return True


@dataclass(frozen=True, slots=True)
class Told:
    """What the kernels were told of a site, and what that rests on."""

    packed: bytes | None  # None: they cannot
    settings: CallSettings
    sinks: Tensor | None  # the packed bytes name its memory


def _tell(cache: BlockCache, site: Site, heads: int, rule: Rule, settings: CallSettings) -> Told:
    sinks = settings.sinks
    if sinks is not None:
        sinks = sinks.detach().float().contiguous()
    memory = kernels.Memory(*cache.tensors(site), cache.scales(site))
    packed = kernels.pack_site(
        memory, cache.dtype, heads, rule, settings.scale, settings.softcap, sinks
    )
    return Told(packed, settings, sinks)


def _attend_run(
    step: StepContext,
    site: Site,
    number: int,
    queries: Tensor,
    out: Tensor,
    rule: Rule,
    settings: CallSettings,
) -> None:
    """One run by torch: queries (heads, n, key_size) into `out` (n, heads, value_size).

    Some heads at a time where what is read is widened, so that no more than a part of it is.
    """
    assert step.cache is not None
    run = step.runs[number]
    first = rule.first_visible(run.start)
    span, visible = step.span(number, first), Visible(rule, first, run.start)
    is_plain = settings.softcap is None and settings.sinks is None
    is_whole = is_plain and run.start == 0 and rule == FULL
    has_mask = is_plain and not is_whole and run.num_tokens > 1
    make_mask = partial(step.mask, number, rule, queries.dtype)
    by_chunk = has_mask and step.device.type != "cpu"
    mask = make_mask() if has_mask and not by_chunk else None
    for low, high in step.cache.parts(site, span):
        group = queries.shape[0] // step.cache.num_heads(site)
        heads = slice(low * group, high * group)
        keys, values = step.cache.read(site, span, slice(low, high))
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        if by_chunk:
            result = attend_chunk(
                queries[heads], keys, values, make_mask, settings.scale, sees_all=rule == FULL
            )
        else:
            result = attend_sequence(
                queries[heads], keys, values, visible, settings.of(heads), mask
            )
        out[:, heads].copy_(result.transpose(0, 1))


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
