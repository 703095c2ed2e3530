"""Linear modules of a layer, called with as little as possible around the product.

Siblings that read the same input (q, k, v; gate, up) are one product where their weights lie one
behind the other. Knows which modules are linear, and nothing of what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.joined_linear import joined_of
from engine.packed_linear import PackedLinear, fused_of


class Projection:
    """One linear module, or several of one parent that read the same input."""

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        """Take the children of these names, which `is_linear` says yes to."""
        modules: list[Any] = [parent.get_submodule(name) for name in names]
        self._matrix, self._bias = _one_matrix(parent, modules)
        self._parts = [_plain(it) for it in modules]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(tokens, in_features) to (tokens, sum of widths), added to `residual` if there is one."""
        if self._matrix is not None:
            result: Tensor = self._matrix.matmul(x, self._bias, residual)
            return result
        parts = [part(x) for part in self._parts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if residual is None else residual + out


def is_linear(module: object) -> bool:
    """Whether a module is y = x W + b, and nothing else."""
    if isinstance(module, PackedLinear) or type(module) is nn.Linear:
        return True
    return type(module).__name__ == "Conv1D"


def _one_matrix(parent: nn.Module, modules: Sequence[Any]) -> tuple[Any, Tensor | None]:
    """The matrix of all modules together, and its bias; None where it takes several."""
    if len(modules) == 1 and isinstance(modules[0], PackedLinear):
        return modules[0].matrix, modules[0].bias
    for fused in fused_of(parent).values():
        if fused.members == tuple(modules):
            return fused.matrix, fused.bias
    for joined in joined_of(parent).values():
        if joined.members == tuple(modules):
            return joined.matrix, joined.bias
    return None, None


def _plain(module: Any) -> Any:
    """The module without what `nn.Module.__call__` costs."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda x: linear(x, weight, bias)
    return module.forward
