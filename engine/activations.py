"""Which activation a module of a model is, by its class.

Knows the classes that torch and transformers have for those that the kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from torch import Tensor
from torch.nn import functional

# What `pointwise.gated` calls it, and what torch has for it.
_KINDS: Final[dict[str, tuple[str, Callable[[Tensor], Tensor]]]] = {
    "SiLUActivation": ("silu", functional.silu),
    "SiLU": ("silu", functional.silu),
    "GELUTanh": ("gelu_tanh", partial(functional.gelu, approximate="tanh")),
    "NewGELUActivation": ("gelu_tanh", partial(functional.gelu, approximate="tanh")),
    "FastGELUActivation": ("gelu_tanh", partial(functional.gelu, approximate="tanh")),
    "GELUActivation": ("gelu", functional.gelu),
    "GELU": ("gelu", functional.gelu),
    "ReLU": ("relu", functional.relu),
}


def kind_of(activation: Any) -> str | None:
    """Its name among those of `pointwise.gated`, or None."""
    return _KINDS.get(type(activation).__name__, (None, None))[0]


def function_of(activation: Any) -> Callable[[Tensor], Tensor]:
    """torch's function for it, or the module itself."""
    return _KINDS.get(type(activation).__name__, (None, activation))[1]
