"""Norms of a layer, recognised by what they compute.

Architectures name and write them in many ways; few things are computed. A module is tried against
each, on numbers, and the first that agrees is it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from engine.kernels import pointwise
from engine.lean.agreement import agrees
from engine.lean.known import says_only

Norm = Callable[[Tensor], Tensor]  # (rows, size) to the same


def find_norm(module: nn.Module, sample: Tensor) -> Norm | None:
    """What does the same as `module`; None where nothing known here does.

    Args:
        sample: (rows, size) of numbers to try it on.
    """
    if not says_only(module, _KNOWN):
        return None
    # Of small numbers the epsilon decides.
    samples = [sample, sample * 1e-3]
    expected = [module(it) for it in samples]
    for norm in _candidates(module):
        if all(agrees(norm(it), said) for it, said in zip(samples, expected, strict=True)):
            return norm
    return None


_EPSILONS: Final = (1e-5, 1e-6)  # of norms that do not say theirs
# What norms say of themselves.
_KNOWN = {"eps", "variance_epsilon", "normalized_shape", "elementwise_affine", "hidden_size"}


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x / rms(x) * (offset + weight). arXiv:1910.07467."""

    weight: Tensor
    eps: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        return pointwise.rms_norm(x, self.weight, self.eps, self.offset)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean(x)) / deviation(x) * weight + bias. arXiv:1607.06450."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return pointwise.layer_norm(x, self.weight, self.bias, self.eps)


def _candidates(module: Any) -> Iterator[Norm]:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if set(module._parameters) - {"weight", "bias"} or module._modules or module._buffers:
        return
    said = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    for eps in _EPSILONS if said is None else (float(said),):
        if weight is not None and bias is None:
            yield RmsNorm(weight, eps, 0.0)
            yield RmsNorm(weight, eps, 1.0)
        yield LayerNorm(weight, bias, eps)
