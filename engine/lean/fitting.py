"""Find a lean form for each layer of a stage, by running the stage once and comparing.

The stage runs some random positions. Beside every layer its candidates run on the same input;
what comes out the same takes the layer's place, and a layer for which nothing does stays as it is.
Knows names and shapes of modules, and no architecture.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from engine import attention
from engine.attention import StageRun, current
from engine.lean.agreement import agrees
from engine.lean.attention_part import Call, find_attention
from engine.lean.feed_forward import FeedForward, Foreign, find_feed_forward
from engine.lean.known import says_only
from engine.lean.layer import LeanLayer
from engine.lean.norm import Norm, find_norm

if TYPE_CHECKING:
    from engine.slots import LayerSlot
    from engine.stage import Stage

log = logging.getLogger("comboio.engine")

_NUM_TOKENS: Final = 5
_ATTENTION: Final = ("self_attn", "attn", "attention")
_FEED_FORWARD: Final = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
# Which norm stands where, by name: before attention, after it, before the feed-forward part, after.
_NORMS: Final = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("ln_1", None, "ln_2", None),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("input_layernorm", None, "input_layernorm", None),
)
# What layers say of themselves without computing more than is done here.
_KNOWN: Final = frozenset(
    {
        "hidden_size",
        "layer_idx",
        "config",
        "attention_type",
        "residual_multiplier",
        "embed_dim",
        "is_sliding",
        "sliding_window",
        "use_parallel_residual",
        "dropout",
        "do_layer_norm_before",
    }
)


@dataclass(slots=True)
class _Heard:
    """What one layer's modules were called with and gave, in one pass."""

    parts: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)  # by child's name
    calls: list[Call] = field(default_factory=list)


def fit_layers(stage: Stage) -> None:
    """Give every layer of a stage its lean form, where one agrees."""
    slots = stage.slots
    hidden = torch.randn(
        _NUM_TOKENS, stage.hidden_size, generator=torch.Generator().manual_seed(1)
    ).to(stage.dtype)
    run = StageRun(
        start=0, num_tokens=_NUM_TOKENS, rope_length=_NUM_TOKENS, blocks=torch.tensor([0])
    )
    ids = torch.arange(_NUM_TOKENS) % stage.vocab_size
    heard = {slot.index: _Heard() for slot in slots}
    with ExitStack() as stack:
        stack.enter_context(_listening(heard))
        for slot in slots:
            stack.enter_context(_hooked(slot, heard[slot.index]))
        stage.forward(ids, hidden, [run], stage.exact_cache(1))
    left = stage.plain_layers
    if left:
        log.info(
            "layers %s run as transformers has them: no lean form of them is known",
            ", ".join(map(str, left)),
        )


@contextmanager
def _listening(heard: dict[int, _Heard]) -> Iterator[None]:
    """Note what is handed to the attention function, while this is open."""

    def listener(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *given: Any, **told: Any
    ) -> Any:
        layer = current().layer
        settings = attention.call_settings(query, **told)
        if settings is not None:
            heard[layer].calls.append(Call(query.clone(), key.clone(), value.clone(), settings))
        return attention.block_attention(module, query, key, value, *given, **told)

    from transformers import AttentionInterface

    AttentionInterface.register(attention.ATTENTION_NAME, listener)
    try:
        yield
    finally:
        AttentionInterface.register(attention.ATTENTION_NAME, attention.block_attention)


@contextmanager
def _hooked(slot: LayerSlot, heard: _Heard) -> Iterator[None]:
    layer = slot.inner
    assert layer is not None

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, settings: Any, out: Any) -> None:
            given = args[0] if args else settings.get("hidden_states")
            if isinstance(given, Tensor):
                heard.parts[name] = (given[0].clone(), out)

        return hook

    def done(_module: nn.Module, args: Any, settings: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            tables = settings.get("position_embeddings")
            slot.lean = _fit(slot.index, layer, heard, args[0][0], tables, out[0])

    handles = [
        child.register_forward_hook(note(name), with_kwargs=True)
        for name, child in layer.named_children()
    ]
    handles.append(layer.register_forward_hook(done, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fit(
    index: int, layer: nn.Module, heard: _Heard, x: Tensor, tables: Any, expected: Tensor
) -> LeanLayer | None:
    """The first candidate that gives what the layer gave."""
    children = {name: it for name, it in layer.named_children() if not isinstance(it, nn.Dropout)}
    attention_name = next((it for it in _ATTENTION if it in children), None)
    feed_name = next((it for it in _FEED_FORWARD if it in children), None)
    if attention_name is None or feed_name is None or len(heard.calls) != 1:
        return None
    if layer._parameters or not says_only(layer, _KNOWN):
        return None
    if not (tables is None or _are_tables(tables)):
        return None
    given, _ = heard.parts[attention_name]
    part = find_attention(children[attention_name], given, tables, heard.calls[0])
    if part is None:
        return None
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    names = set(children) - {attention_name, feed_name}
    for norm_names in _NORMS:
        if {name for name in norm_names if name is not None} != names:
            continue
        norms = _norms(children, norm_names, x)
        if norms is None:
            continue
        for feed in _feed_forwards(children[feed_name], heard.parts.get(feed_name)):
            for parallel in (False, True):
                lean = LeanLayer(
                    attention=part,
                    feed_forward=feed,
                    before_attention=norms[0],
                    after_attention=norms[1],
                    before_feed_forward=norms[2],
                    after_feed_forward=norms[3],
                    scale=scale,
                    parallel=parallel,
                )
                if parallel and (norms[1] or norms[3] or scale != 1.0):
                    continue
                current().enter_layer(index)
                if agrees(lean(x, tables, current()), expected):
                    return lean
    return None


def _feed_forwards(module: nn.Module, heard: tuple[Tensor, Any] | None) -> Iterator[FeedForward]:
    if heard is not None:
        given, out = heard
        if isinstance(out, Tensor):
            feed = find_feed_forward(module)
            if feed is not None and agrees(feed(given, None), out.view(given.shape)):
                yield feed
    yield Foreign(module)


def _norms(
    children: dict[str, nn.Module], names: tuple[str | None, ...], sample: Tensor
) -> list[Norm | None] | None:
    """The four norms; None where one of them is not known here."""
    found: list[Norm | None] = []
    for name in names:
        norm = None if name is None else find_norm(children[name], sample)
        if name is not None and norm is None:
            return None
        found.append(norm)
    return found


def _are_tables(tables: Any) -> bool:
    return (
        isinstance(tables, tuple)
        and len(tables) == 2
        and all(isinstance(it, Tensor) and it.ndim == 3 and it.shape[0] == 1 for it in tables)
    )
