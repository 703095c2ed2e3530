"""The attention part of a layer: projections, norms of heads, rotary positions, attention.

Recognised by its modules' names, and tried on what the module handed to the attention function:
queries, keys and values must come out the same. Scale, soft cap, sinks and what is visible are
taken from that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from torch import Tensor, nn

from engine.attention import CallSettings, StepContext, attend
from engine.lean.agreement import agrees
from engine.lean.known import says_only
from engine.lean.norm import Norm, find_norm
from engine.lean.projection import Projection, is_linear
from engine.lean.turn import TURNS, Tables, Turn

_QKV: Final = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("c_attn",), ("query_key_value",))
_OUT: Final = ("o_proj", "dense", "c_proj", "out_proj")
_HEAD_NORMS: Final = (
    ("q_norm", "k_norm"),
    ("q_layernorm", "k_layernorm"),
    ("query_layernorm", "key_layernorm"),
)
# What attention modules say of themselves without computing more than is done here. A module that
# says anything else is left alone: it may do more at other positions or other numbers.
_KNOWN: Final = frozenset(
    {
        "config",
        "layer_idx",
        "layer_type",
        "attention_type",
        "head_dim",
        "head_size",
        "hidden_size",
        "embed_dim",
        "split_size",
        "num_heads",
        "num_attention_heads",
        "num_key_value_heads",
        "num_key_value_groups",
        "scaling",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "is_cross_attention",
        "is_causal",
        "is_sliding",
        "sliding_window",
        "attention_dropout",
        "residual_dropout",
        "rotary_ndims",
        "qk_layernorm",
        "use_rope",
        "attn_logit_softcapping",
        "partial_rotary_factor",
        "sliding_window_pattern",
    }
)


@dataclass(frozen=True, slots=True)
class Call:
    """What a module handed to the attention function, once."""

    query: Tensor  # (1, heads, tokens, key_size)
    key: Tensor  # (1, kv_heads, tokens, key_size)
    value: Tensor  # (1, kv_heads, tokens, value_size)
    settings: CallSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """In which of the usual ways queries, keys and values are made."""

    turn: Turn | None  # how rotary positions are applied
    per_head: bool  # the projection gives q, k, v of one head after the other's
    norms: tuple[Norm, Norm] | None  # of queries and keys
    norms_whole: bool  # over all heads together
    norms_last: bool  # after the rotary positions


class Attention:
    """Hidden states in, hidden states out, by way of the KV blocks."""

    def __init__(self, qkv: Projection, out: Projection, call: Call, form: Form) -> None:
        self._qkv, self._out, self._settings, self._form = qkv, out, call.settings, form
        self._heads, self._size = call.query.shape[1], call.query.shape[3]
        self._kv_heads, self._value_size = call.key.shape[1], call.value.shape[3]
        keys = self._heads * self._size
        values = keys + self._kv_heads * self._size
        self._cuts = keys, values, values + self._kv_heads * self._value_size

    def __call__(
        self, x: Tensor, residual: Tensor | None, tables: Tables | None, step: StepContext
    ) -> Tensor:
        """(tokens, hidden_size) to the same."""
        query, key, value = self.heads(x, tables)
        result = attend(step, query, key, value, self._settings)
        return self._out(result.view(x.shape[0], -1), residual)

    def heads(self, x: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (tokens, heads, size) each."""
        form, norms = self._form, self._form.norms
        query, key, value = self._cut(self._qkv(x))
        if norms is not None and not form.norms_last:
            query, key = self._normed(query, norms[0]), self._normed(key, norms[1])
        if form.turn is not None:
            assert tables is not None
            query, key = form.turn(query, key, tables)
        if norms is not None and form.norms_last:
            query, key = self._normed(query, norms[0]), self._normed(key, norms[1])
        return query, key, value

    def _cut(self, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, (keys, values, stop) = both.shape[0], self._cuts
        if self._form.per_head:
            heads = both.view(tokens, self._heads, -1)
            size = self._size
            return heads[..., :size], heads[..., size : 2 * size], heads[..., 2 * size :]
        return (
            both[:, :keys].view(tokens, self._heads, self._size),
            both[:, keys:values].view(tokens, self._kv_heads, self._size),
            both[:, values:stop].view(tokens, self._kv_heads, self._value_size),
        )

    def _normed(self, heads: Tensor, norm: Norm) -> Tensor:
        if self._form.norms_whole:
            return norm(heads.reshape(heads.shape[0], -1)).view(heads.shape)
        return norm(heads)


def find_attention(
    module: nn.Module, x: Tensor, tables: Tables | None, call: Call
) -> Attention | None:
    """What computes the same queries, keys and values as `module`, None where nothing does.

    Args:
        x: (tokens, hidden_size), what the module was called with,
        tables: and under which rotary tables,
        call: and what it made of them.
    """
    expected = [it[0].transpose(0, 1) for it in (call.query, call.key, call.value)]
    for attention in _candidates(module, tables, call):
        try:
            found = attention.heads(x, tables)
        except (RuntimeError, ValueError):  # shapes that do not fit: not this form
            continue
        if all(agrees(one.contiguous(), other) for one, other in zip(found, expected, strict=True)):
            return attention
    return None


def _candidates(module: Any, tables: Tables | None, call: Call) -> Iterator[Attention]:
    children: dict[str, nn.Module] = {
        name: it for name, it in module.named_children() if not isinstance(it, nn.Dropout)
    }
    linears = {name for name, it in children.items() if is_linear(it)}
    out = next((name for name in _OUT if name in linears), None)
    qkv = next((it for it in _QKV if {*it, out} == linears), None)
    norms = next((it for it in _HEAD_NORMS if it[0] in children and it[1] in children), ())
    if out is None or qkv is None or set(children) - linears - set(norms):
        return
    if set(module._parameters) - {"sinks"} or module._buffers or not says_only(module, _KNOWN):
        return
    parts = Projection(module, qkv), Projection(module, [out])
    turns = (None,) if tables is None else (*TURNS, None)
    for turn, per_head in product(turns, (False, True) if len(qkv) == 1 else (False,)):
        if not norms:
            form = Form(
                turn=turn, per_head=per_head, norms=None, norms_whole=False, norms_last=False
            )
            yield Attention(*parts, call, form)
            continue
        for whole, last in product((False, True), (False, True)):
            found = _head_norms(children, norms, call, whole)
            if found is not None:
                form = Form(
                    turn=turn, per_head=per_head, norms=found, norms_whole=whole, norms_last=last
                )
                yield Attention(*parts, call, form)


def _head_norms(
    children: dict[str, nn.Module], names: tuple[str, ...], call: Call, whole: bool
) -> tuple[Norm, Norm] | None:
    found = []
    for name, heads in zip(names, (call.query, call.key), strict=True):
        sample = heads[0].transpose(0, 1)  # (tokens, heads, size)
        sample = sample.reshape(len(sample), -1) if whole else sample.contiguous()
        try:
            norm = find_norm(children[name], sample)
        except RuntimeError:  # its weights are of another size
            return None
        if norm is None:
            return None
        found.append(norm)
    return found[0], found[1]
