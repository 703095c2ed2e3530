"""Bring some of a checkpoint's tensors into a model that was built on the meta device.

Which checkpoint keys make which parameter (renamed, stacked, split) is transformers' own
knowledge (`transformers.core_model_loading`); this file asks it, keeps what is wanted, and reads
parameter by parameter, so that no more than one parameter's sources are in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.architecture import Architecture, find_layers
from engine.checkpoint import Checkpoint, Progress
from proto.errors import ModelError

Wanted = Callable[[str], bool]  # by parameter name


class WeightPlan:
    """Which checkpoint keys make which parameters of one model."""

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        checkpoint: Checkpoint,
        *,
        mapped: bool = False,
    ) -> None:
        """Map every checkpoint key to the parameter it belongs to; reads no tensor.

        Args:
            model: the whole model on the meta device, no layer removed yet.
            mapped: let parameters be mappings of their files where dtypes agree, instead of
                copies in memory.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self._model, self._checkpoint, self._name = model, checkpoint, architecture.name
        self._mapped = mapped
        self._shapes: dict[str, Tensor] = model.state_dict()
        # Two parameters that are one tensor; a checkpoint stores either of them, or both.
        tied = dict(getattr(model, "all_tied_weights_keys", {}))
        self._tied: dict[str, str] = {**{b: a for a, b in tied.items()}, **tied}
        transforms = get_model_conversion_mapping(model)
        renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
        converters = [it for it in transforms if isinstance(it, WeightConverter)]
        by_pattern = {pattern: it for it in converters for pattern in it.source_patterns}
        without_prefix = _prefix_remover(model, architecture, checkpoint)
        # First target -> (the transform, [(its source pattern, checkpoint key)])
        self._steps: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for key in sorted(checkpoint, key=_natural):
            plain = without_prefix(key)
            target, pattern = rename_source_key(
                plain, renamings, converters, model.base_model_prefix, self._shapes
            )
            if target not in self._shapes and plain in self._shapes:
                target, pattern = plain, None
            if target not in self._shapes:
                continue  # another part of a larger checkpoint, or a buffer of old days
            if pattern is None:
                self._steps[target] = (None, [(key, key)])
            else:
                transform = self._steps.get(target, (deepcopy(by_pattern[pattern]), []))
                transform[1].append((pattern, key))
                self._steps[target] = transform

    def sources(self, wanted: Wanted) -> list[str]:
        """The checkpoint keys that the wanted parameters are made of."""
        twins = [twin for _, twin in self._tied_targets(wanted)]
        return [key for it in [*self._targets(wanted), *twins] for _, key in self._steps[it][1]]

    def source_bytes(self, wanted: Wanted) -> int:
        """How many bytes loading the wanted parameters will read."""
        return sum(self._checkpoint.entry(key).num_bytes for key in self.sources(wanted))

    def load(self, wanted: Wanted, device: torch.device, progress: Progress | None) -> int:
        """Read the wanted parameters into the model and return the bytes they hold there.

        Raises:
            ModelError: a wanted parameter is not in the checkpoint, or has another shape there.
        """
        held = 0
        for target in self._targets(wanted):
            for name, value in self._made(target, progress).items():
                if wanted(name) or name == target:
                    held += self._assign(name, value, device)
        for name, twin in self._tied_targets(wanted):
            if self._is_meta(name):
                (value,) = self._made(twin, progress, like=name).values()
                held += self._assign(name, value, device)
        missing = [name for name in self._shapes if wanted(name) and self._is_meta(name)]
        if missing:
            raise ModelError(
                f"{self._checkpoint.name} lacks {len(missing)} tensors that {self._name} needs "
                f"({missing[0]} for one): fetch the whole checkpoint"
            )
        return held

    def _targets(self, wanted: Wanted) -> list[str]:
        return [target for target in self._steps if wanted(target)]

    def _tied_targets(self, wanted: Wanted) -> list[tuple[str, str]]:
        """Wanted parameters that are stored under another's name: (parameter, that other one).

        An lm_head that is the embedding matrix, say, where only the matrix is stored.
        """
        return [
            (name, twin)
            for name, twin in self._tied.items()
            if wanted(name) and name not in self._steps and twin in self._steps
        ]

    def _made(
        self, target: str, progress: Progress | None, like: str | None = None
    ) -> dict[str, Tensor]:
        """Read what `target` is made of, and make it (and its siblings, where one key splits)."""
        transform, sources = self._steps[target]
        dtype = self._dtype(like or target)
        if transform is None:
            return {target: self._read(sources[0][1], dtype, progress)}
        for pattern, key in sources:
            transform.add_tensor(target, key, pattern, partial(self._read, key, dtype, progress))
        with torch.no_grad():
            made = transform.convert(target, model=self._model, config=self._model.config)
        return {name: it[0] if isinstance(it, list) else it for name, it in made.items()}

    def _read(self, key: str, dtype: torch.dtype, progress: Progress | None) -> Tensor:
        if self._mapped:
            tensor = self._checkpoint.map(key)
        else:
            tensor = self._checkpoint.read(key, progress)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def _dtype(self, name: str) -> torch.dtype:
        """The parameter's dtype; a few models keep some parameters in float32 whatever is asked."""
        meant = self._shapes[name].dtype
        patterns = set(getattr(self._model, "_keep_in_fp32_modules_strict", None) or ())
        if meant == torch.float16:
            patterns |= set(getattr(self._model, "_keep_in_fp32_modules", None) or ())
        parts = name.split(".")
        return torch.float32 if any(it in parts for it in patterns) else meant

    def _is_meta(self, name: str) -> bool:
        module, leaf = _owner(self._model, name)
        value: Tensor | None = module._parameters.get(leaf)
        if value is None:
            value = module._buffers.get(leaf)
        return value is not None and value.is_meta

    def _assign(self, name: str, value: Tensor, device: torch.device) -> int:
        expected = tuple(self._shapes[name].shape)
        if tuple(value.shape) != expected:
            raise ModelError(
                f"{self._checkpoint.name}: tensor for {name} has shape {list(value.shape)}, "
                f"{self._name} with this config.json wants {list(expected)}"
            )
        module, leaf = _owner(self._model, name)
        value = value.to(device).contiguous()
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        if leaf in module._parameters:
            parameter = nn.Parameter(value, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = value
        return value.numel() * value.dtype.itemsize


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer that no checkpoint stores (rotary tables, scales) its computed value.

    The models compute these in `_init_weights`, which leaves alone what is marked as loaded.
    """
    from transformers import initialization

    for module in model.modules():
        meta = [leaf for leaf, it in module._buffers.items() if it is not None and it.is_meta]
        if not meta:
            continue
        for leaf in meta:
            old = module._buffers[leaf]
            module._buffers[leaf] = torch.zeros(old.shape, dtype=old.dtype, device=device)
        with torch.no_grad(), initialization.guard_torch_init_functions():
            model._init_weights(module)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sort key that puts expert 10 behind expert 9: stacked tensors keep their order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _prefix_remover(
    model: nn.Module, architecture: Architecture, checkpoint: Checkpoint
) -> Callable[[str], str]:
    """How to strip what a multimodal checkpoint puts in front of its language model's keys.

    The prefix is the one under which the checkpoint has most of a decoder layer's own names.
    """
    if not architecture.nested:
        return lambda key: key
    path, layers = find_layers(model, architecture)
    own, _, leaf = path.rpartition(".")
    own = f"{own}." if own else ""
    first = f"{leaf}.0."
    tails = {first + name for name in layers[0].state_dict()}
    counts: dict[str, int] = {}
    for key in checkpoint:
        match = re.search(rf"(^|\.){re.escape(first)}", key)
        if match:
            start = match.end() - len(first)
            counts[key[:start]] = counts.get(key[:start], 0) + (key[start:] in tails)
    if not counts:
        return lambda key: key
    prefix = max(counts, key=lambda it: counts[it])
    # "language_model.model." before the layers is "language_model." before the lm_head.
    outer = prefix[: -len(own)] if own and prefix.endswith(own) else None

    def without(key: str) -> str:
        if key.startswith(prefix):
            return own + key[len(prefix) :]
        if outer and key.startswith(outer):
            return key[len(outer) :]
        return key

    return without
