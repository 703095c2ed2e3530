"""Weights of siblings that read one input, in one tensor: a GPU multiplies them in one call.

The same names as for packed ones (`engine.packed_linear`). Each module keeps its own weight, as a
part of the common one, so that whoever calls it alone notices nothing. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.packed_linear import fusable


class JoinedWeight:
    """(rows, cols) of several modules, one behind the other; multiplies as packed ones do."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def matmul(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias + residual; (..., cols) to (..., rows)."""
        y = linear(x, self.weight, bias)
        return y if residual is None else residual + y


@dataclass(frozen=True, slots=True)
class Joined:
    """Siblings whose weights are parts of one."""

    matrix: JoinedWeight
    members: tuple[nn.Module, ...]
    bias: Tensor | None


def joined_of(parent: nn.Module) -> dict[str, Joined]:
    """What of a module's children was joined, by the names in FUSED."""
    found: dict[str, Joined] = parent.__dict__.get("_joined", {})
    return found


def join_siblings(modules: Iterable[nn.Module]) -> int:
    """Join the plain linear children of each module, where there are some that can be.

    No more than one group is held twice at a time.

    Returns:
        How many groups were joined.
    """
    count = 0
    for parent in list(modules):
        plain: dict[nn.Module, str] = {
            it: f"{it.weight.dtype} {it.weight.device}"
            for it in parent.children()
            if type(it) is nn.Linear and not it.weight.is_meta
        }
        found = {}
        for name, names in list(fusable(parent, plain)):
            found[name] = _join([parent.get_submodule(it) for it in names])
        if found:
            parent.__dict__["_joined"] = found
            count += len(found)
    return count


def release(modules: Iterable[nn.Module]) -> None:
    """Free the common weights; nothing can be computed with them any more."""
    for parent in modules:
        for it in joined_of(parent).values():
            it.matrix.weight = torch.empty(0)


def _join(members: list[nn.Module]) -> Joined:
    bias = None if members[0]._parameters.get("bias") is None else _common(members, "bias")
    return Joined(JoinedWeight(_common(members, "weight")), tuple(members), bias)


def _common(members: list[nn.Module], leaf: str) -> Tensor:
    own = [it.get_parameter(leaf).detach() for it in members]
    common = torch.cat(own)
    parts = torch.split(common, [len(it) for it in own])
    for member, part in zip(members, parts, strict=True):
        setattr(member, leaf, nn.Parameter(part, requires_grad=False))
    return common
