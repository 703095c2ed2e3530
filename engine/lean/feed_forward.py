"""The feed-forward part of a layer: gated or plain, recognised by its modules' names.

A part that is neither (a mixture of experts, say) stays the module that it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from engine.activations import function_of, kind_of
from engine.kernels import pointwise
from engine.lean.projection import Projection, is_linear

FeedForward = Callable[[Tensor, "Tensor | None"], Tensor]  # x, residual to add

# What reads the input, and what reads its activation.
_GATED: Final = ((("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"))
_PLAIN: Final = (
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
_ACTIVATIONS: Final = ("act_fn", "activation_fn", "act")


def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """What computes `module` by its form; the caller tries it on numbers."""
    children = {name: it for name, it in module.named_children() if not isinstance(it, nn.Dropout)}
    linears = {name for name, it in children.items() if is_linear(it)}
    activation: Any = next((getattr(module, it, None) for it in _ACTIVATIONS), None)
    for name in _ACTIVATIONS:
        activation = getattr(module, name, activation)
    if not callable(activation) or set(children) - linears - set(_ACTIVATIONS):
        return None
    if module._parameters or module._buffers:
        return None
    for forms, made in ((_GATED, Gated), (_PLAIN, Plain)):
        for first, second in forms:
            if {*first, second} == linears:
                parts = Projection(module, first), Projection(module, [second])
                return made(*parts, activation)
    return None


class Gated:
    """second(act(gate) * up), where the first gives gate and up. arXiv:2002.05202."""

    def __init__(self, first: Projection, second: Projection, activation: Any) -> None:
        self._first, self._second, self._activation = first, second, activation
        self._kind = kind_of(activation)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        both = self._first(x)
        if self._kind is not None:
            return self._second(pointwise.gated(self._kind, both), residual)
        gate, up = both.chunk(2, dim=-1)
        return self._second(self._activation(gate) * up, residual)


class Plain:
    """second(act(first(x)))."""

    def __init__(self, first: Projection, second: Projection, activation: Any) -> None:
        self._first, self._second = first, second
        self._activation = function_of(activation)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._second(self._activation(self._first(x)), residual)


class Foreign:
    """The module itself, whatever it computes."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        out = self._module(x.unsqueeze(0))
        result: Tensor = (out[0] if isinstance(out, tuple) else out).view_as(x)
        return result if residual is None else residual + result
