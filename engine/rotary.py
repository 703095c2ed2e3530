"""Rotary tables that depend on a sequence's length, for batches of many sequences.

transformers' dynamic NTK and LongRoPE tables are chosen by the longest position in the call and,
for dynamic NTK, by what was called before. A step mixes sequences, so here each token gets the
tables of its own sequence's length, computed from nothing but that length: neither neighbours in
the batch nor earlier steps change a token's result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.attention import StepContext, current

_LENGTH_DEPENDENT: Final = ("dynamic", "longrope")


def by_length(model: nn.Module) -> int:
    """Make every length-dependent rotary module of `model` work per sequence; returns how many."""
    found = 0
    for module in model.modules():
        said = getattr(module, "rope_type", None)
        kinds = said.values() if isinstance(said, dict) else [said]
        if any(kind in str(it) for it in kinds for kind in _LENGTH_DEPENDENT):
            module.forward = _Rotary(module)
            found += 1
    return found


class _Rotary:
    """Calls the module's own forward once for each length regime in the step."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._forward: Callable[..., Any] = module.forward
        # As first made: (attribute, value) of every buffer and counter that calls may change.
        self._pristine = {
            name: (value.clone() if isinstance(value, Tensor) else value)
            for name, value in _state(module).items()
        }

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **settings: Any) -> Any:
        step = current()
        groups = rope_groups(step, self._regime(*args, **settings))
        if len(groups) == 1:
            length, _ = groups[0]
            return self._tables(x, position_ids, length, *args, **settings)
        parts = [
            (index, self._tables(x, position_ids[:, index], length, *args, **settings))
            for length, index in groups
        ]
        return _merge(parts, position_ids.shape[1])

    def _regime(self, *args: Any, **settings: Any) -> Callable[[int], int]:
        """Maps a length to a number that is equal for lengths with equal tables."""
        module = self._module
        layer_type = settings.get("layer_type", args[0] if args else None)
        parameters = module.config.rope_parameters
        if layer_type is not None and layer_type in parameters:
            parameters = parameters[layer_type]
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        if kind == "longrope":
            original = int(parameters["original_max_position_embeddings"])
            return lambda length: int(length > original)
        original = int(getattr(module, "original_max_seq_len", 0))
        return lambda length: max(length, original)

    def _tables(
        self, x: Tensor, position_ids: Tensor, length: int, *args: Any, **settings: Any
    ) -> Any:
        """Tables for (1, n) positions of sequences of one length: (1, n, size) each.

        The module looks at the largest position only, so one more position says the length.
        """
        for name, value in self._pristine.items():
            setattr(self._module, name, value.clone() if isinstance(value, Tensor) else value)
        extra = torch.cat([position_ids, position_ids.new_full((1, 1), length - 1)], dim=1)
        tables = self._forward(x, extra, *args, **settings)
        if isinstance(tables, tuple):
            return tuple(it[:, :-1] for it in tables)
        return tables[:, :-1]


def rope_groups(step: StepContext, regime: Callable[[int], int]) -> list[tuple[int, Tensor]]:
    """Tokens of the step that share rotary tables: (a length of theirs, places in the step)."""
    places: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    row = 0
    for run in step.runs:
        for position in range(run.start, run.stop):
            length = max(run.rope_length, position + 1)
            key = regime(length)
            places.setdefault(key, []).append(row)
            lengths[key] = max(lengths.get(key, 0), length)
            row += 1
    return [(lengths[key], torch.tensor(rows, device=step.device)) for key, rows in places.items()]


def _merge(parts: list[tuple[Tensor, Any]], num_tokens: int) -> Any:
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(
            _merge([(index, tables[i]) for index, tables in parts], num_tokens)
            for i in range(len(first))
        )
    out = first.new_empty(first.shape[0], num_tokens, *first.shape[2:])
    for index, table in parts:
        out[:, index] = table
    return out


def _state(module: nn.Module) -> dict[str, Any]:
    """Everything that a rotary module's forward may overwrite."""
    state: dict[str, Any] = dict(module._buffers)
    for name, value in vars(module).items():
        if name.endswith(("max_seq_len_cached", "attention_scaling", "original_inv_freq")):
            state[name] = value
    return state
