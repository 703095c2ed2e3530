"""Add adapters to a stage's linear modules, for the rows of a step that ask for them.

An adapter is a pair of small matrices beside each of some modules. While a step runs that has
sequences with adapters, these modules' forward is replaced by one that changes their rows of the
result; when it ends, and for every other step, the model is as it was: nothing is wrapped, and an
adapter that is let go leaves nothing behind. Arithmetic is peft's, in float32 as there. Knows no
file and no name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from proto.errors import StepFailed

Rows = slice | Tensor  # of a step: one stretch, or (rows,) int64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoraLayer:
    """What one adapter adds to one module. All tensors are float32 on the stage's device.

    LoRA: arXiv:2106.09685. DoRA: arXiv:2402.09353.
    """

    module: nn.Module
    first: Tensor  # (rank, in_features)
    second: Tensor  # (out_features, rank)
    scaling: float
    bias: Tensor | None = None  # (out_features,), of the second
    # DoRA: what each feature of the result is multiplied with, (out_features,); the learnt
    # magnitude by the length of its row of weights, matrices included.
    stretch: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Held in memory."""
        held = (self.first, self.second, self.bias, self.stretch)
        return sum(it.numel() * it.dtype.itemsize for it in held if it is not None)

    def change(self, given: Tensor, result: Tensor, rows: Rows) -> None:
        """Add the adapter's part to some rows of `result`, in place.

        Args:
            given: (tokens, in_features), what the module was called with.
            result: (tokens, out_features), what it answered.
        """
        low = linear(given[rows].float(), self.first)
        if self.stretch is not None or self.bias is not None or result.dtype != torch.float32:
            result[rows] = self._changed(low, result[rows].float()).to(result.dtype)
        elif isinstance(rows, slice):
            result[rows].addmm_(low, self.second.t(), alpha=self.scaling)
        else:
            result.index_add_(0, rows, linear(low, self.second), alpha=self.scaling)

    def _changed(self, low: Tensor, base: Tensor) -> Tensor:
        added = linear(low, self.second, self.bias) * self.scaling
        if self.stretch is None:
            return base + added
        own_bias: Any = getattr(self.module, "bias", None)
        without_bias = base if own_bias is None else base - own_bias
        return base + (self.stretch - 1) * without_bias + self.stretch * added


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One stage's part of an adapter, ready to run."""

    fingerprint: str  # of the whole adapter; equal along a chain
    layers: Mapping[str, LoraLayer]  # by path of the module

    @property
    def num_bytes(self) -> int:
        """Held in memory, by this stage."""
        return sum(layer.num_bytes for layer in self.layers.values())


@contextmanager
def applied(adapters: Sequence[tuple[Adapter | None, int]], device: torch.device) -> Iterator[None]:
    """Have a model's modules apply these adapters, for the block.

    Args:
        adapters: of each stretch of a step, in order, and how many rows the stretch has.
        device: where the model is.
    """
    groups = _groups(adapters, device)
    if not groups:
        yield
        return
    num_rows = sum(count for _, count in adapters)
    changed = _changes(groups)
    before = {module: module.__dict__.get("forward") for module in changed}
    for module, changes in changed.items():
        # In the instance's own dictionary it stands before the class's forward: what a hook does,
        # without a hook's cost.
        module.__dict__["forward"] = partial(_forward, module.forward, num_rows, changes)
    try:
        yield
    finally:
        for module, own in before.items():
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


def _changes(
    groups: Sequence[tuple[Adapter, Rows]],
) -> dict[nn.Module, list[tuple[LoraLayer, Rows]]]:
    changes: dict[nn.Module, list[tuple[LoraLayer, Rows]]] = {}
    for adapter, rows in groups:
        for layer in adapter.layers.values():
            changes.setdefault(layer.module, []).append((layer, rows))
    return changes


def _forward(
    forward: Callable[[Tensor], Tensor],
    num_rows: int,
    changes: Sequence[tuple[LoraLayer, Rows]],
    given: Tensor,
) -> Tensor:
    """A module's own forward, and what the adapters add to its rows."""
    result = forward(given)
    flat, changed = given.reshape(-1, given.shape[-1]), result.view(-1, result.shape[-1])
    if len(flat) != num_rows:
        raise StepFailed(
            f"an adapted module sees {len(flat)} rows of a step of {num_rows}: "
            "whose they are cannot be told"
        )
    for layer, rows in changes:
        layer.change(flat, changed, rows)
    return result


def _groups(
    adapters: Sequence[tuple[Adapter | None, int]], device: torch.device
) -> list[tuple[Adapter, Rows]]:
    """The rows of each adapter that occurs, as one slice where they follow each other."""
    stretches: dict[Adapter, list[slice]] = {}
    row = 0
    for adapter, count in adapters:
        stretch = slice(row, row := row + count)
        if adapter is None:
            continue
        known = stretches.setdefault(adapter, [])
        if known and known[-1].stop == stretch.start:
            known[-1] = slice(known[-1].start, stretch.stop)
        else:
            known.append(stretch)
    return [(adapter, _rows(known, device)) for adapter, known in stretches.items()]


def _rows(stretches: Sequence[slice], device: torch.device) -> Rows:
    if len(stretches) == 1:
        return stretches[0]
    return torch.cat([torch.arange(it.start, it.stop) for it in stretches]).to(device)
