"""Bring some of a checkpoint's tensors into a model that was built on the meta device.

Which checkpoint keys make which parameter (renamed, stacked, split) is transformers' own
knowledge (`transformers.core_model_loading`); this file asks it, keeps what is wanted, and reads
parameter by parameter, so that no more than one parameter's sources are in memory at a time. What
is packed (`engine.packed_linear`) is read in parts of a parameter: some rows, or one expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.architecture import Architecture, find_layers
from engine.checkpoint import Checkpoint
from engine.packed_linear import Packed
from engine.safetensors_file import Progress
from engine.stored_quantized import StoredTensors
from proto.errors import ModelError

# What a model computes for itself: the largest there are hold a truth value for each two positions.
_MAX_BUFFER_BYTES: Final = 2**30

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
        self._stored = StoredTensors(checkpoint)
        self._mapped = mapped
        self._shapes: dict[str, Tensor] = model.state_dict()
        self._largest = max((it.numel() for it in self._shapes.values()), default=0)
        # Two parameters that are one tensor; a checkpoint stores either of them, or both.
        tied = dict(getattr(model, "all_tied_weights_keys", {}))
        self._tied: dict[str, str] = {**{b: a for a, b in tied.items()}, **tied}
        transforms = get_model_conversion_mapping(model)
        renamings = [it for it in transforms if isinstance(it, WeightRenaming)]
        converters = [it for it in transforms if isinstance(it, WeightConverter)]
        by_pattern = {pattern: it for it in converters for pattern in it.source_patterns}
        without_prefix = _prefix_remover(model, architecture, self._stored)
        # First target -> (the transform, [(its source pattern, checkpoint key)])
        self._steps: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        for key in sorted(self._stored, key=_natural):
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
        """The checkpoint keys that the wanted parameters are made of, and that are not here yet."""
        return [key for it in self._needed(wanted) for key in self._keys(it)]

    def source_bytes(self, wanted: Wanted) -> int:
        """How many bytes loading the wanted parameters will read."""
        return sum(self._checkpoint.entry(key).num_bytes for key in self.sources(wanted))

    def recipe(self, name: str) -> tuple[list[str], str] | None:
        """What a parameter is made of: checkpoint keys, in order, and what is done with them.

        None where a key makes several parameters: then they are not told apart.
        """
        target = name if name in self._steps else self._tied.get(name, "")
        if target not in self._steps:
            return None
        transform = self._steps[target][0]
        how = self._stored.method
        if transform is not None:
            if len(transform.target_patterns) != 1:
                return None
            how += f"{transform.source_patterns} {transform.operations}"
        return self._keys(target), how

    def dtype_of(self, name: str) -> torch.dtype:
        """The parameter's dtype; a few models keep some parameters in float32 whatever is asked."""
        if name not in self._shapes:
            return torch.float32
        meant = self._shapes[name].dtype
        patterns = set(getattr(self._model, "_keep_in_fp32_modules_strict", None) or ())
        if meant == torch.float16:
            patterns |= set(getattr(self._model, "_keep_in_fp32_modules", None) or ())
        parts = name.split(".")
        return torch.float32 if any(it in parts for it in patterns) else meant

    def load(self, wanted: Wanted, device: torch.device, progress: Progress | None) -> int:
        """Read the wanted parameters into the model and return the bytes they hold there.

        What is packed, and is there already, is not read. `check` goes before, and before memory is
        taken for what is packed.

        Raises:
            ModelError: a wanted parameter is not in the checkpoint, or cannot be read.
        """
        held = 0
        for target in self._needed_targets(wanted):
            held += self._load(target, target, wanted, device, progress)
        for name, twin in self._tied_targets(wanted):
            if self._lacks(name):
                held += self._load(name, twin, wanted, device, progress)
        missing = [name for name in self._shapes if wanted(name) and self._lacks(name)]
        if missing:
            raise ModelError(
                f"{self._checkpoint.name} lacks {len(missing)} tensors that {self._name} needs "
                f"({missing[0]} for one): fetch the whole checkpoint"
            )
        return held

    def check(self, wanted: Wanted) -> None:
        """See that the wanted parameters are stored in their own sizes; reads headers, no tensor.

        So what a file says of its sizes costs no memory, and what a config says of them no more
        than weights that are there.

        Raises:
            ModelError: names the first that is not.
        """
        same = [(name, name) for name in self._steps if wanted(name)]
        for name, target in (*same, *self._tied_targets(wanted)):
            transform, sources = self._steps[target]
            meant, shapes = self._shapes[name], [self._stored.shape(key) for _, key in sources]
            if transform is None and shapes != [tuple(meant.shape)]:
                raise self._misshapen(name, shapes[0])
            # Several make one, or one makes several: numbers are only put in another order.
            parts = 1 if transform is None else len(transform.target_patterns)
            stored = sum(map(math.prod, shapes))
            if not meant.numel() <= stored <= parts * self._largest:
                raise ModelError(
                    f"{self._checkpoint.name}: the tensors for {name} have {stored} numbers, "
                    f"{self._name} with this config.json wants {meant.numel()}"
                )
            for _, key in sources:
                dtype = self._stored.dtype(key)
                if meant.is_floating_point() and not dtype.is_floating_point:
                    raise ModelError(
                        f"{self._checkpoint.name}: tensor {key} is of {dtype}, and {self._name} "
                        "wants numbers with a fraction there: the checkpoint is stored in a way "
                        "that its config.json does not say"
                    )

    def _load(
        self,
        name: str,
        target: str,
        wanted: Wanted,
        device: torch.device,
        progress: Progress | None,
    ) -> int:
        """Read what the parameter `name` is made of; `target` is what that is stored under."""
        packed = self._packed_owner(name)
        if packed is not None and self._pack(*packed, name, target, progress):
            return 0
        held = 0
        for made, value in self._made(target, progress, like=name).items():
            if target != name:
                held += self._assign(name, value, device)
            elif wanted(made) or made == name:
                held += self._assign(made, value, device)
        return held

    def _pack(
        self, module: Packed, leaf: str, name: str, target: str, progress: Progress | None
    ) -> bool:
        """Give a packed module its weight part by part; False where it comes only as a whole."""
        shape = tuple(self._shapes[name].shape)
        transform, sources = self._steps[target]
        if transform is None:
            key = sources[0][1]
            stored = self._stored.shape(key)
            if stored != shape:
                raise self._misshapen(name, stored)
            step = module.part_length(leaf)
            for start in range(0, shape[0], step):
                part = self._stored.read_part(key, start, min(start + step, shape[0]), progress)
                module.take(leaf, start, self._for_packing(module, part, name))
            return True
        experts = _one_by_one(transform, sources, shape)
        if experts is None:
            return False
        for number, own in enumerate(experts):
            part = self._converted(transform, target, own, None, progress)
            if tuple(part.shape) != (1, *shape[1:]):
                raise self._misshapen(name, (len(experts), *part.shape[1:]))
            module.take(leaf, number, self._for_packing(module, part, name))
        return True

    def _for_packing(self, module: Packed, part: Tensor, name: str) -> Tensor:
        """Rounding is done once, from what is stored; without rounding, in the model's dtype."""
        if module.format in ("bf16", "bf12"):
            return part.to(self.dtype_of(name))
        # Rounded, they would be numbers like any other, and the stage's own check would see none.
        lowest, highest = torch.aminmax(part if part.dtype.itemsize > 1 else part.float())
        if not bool(lowest.isfinite() & highest.isfinite()):
            raise ModelError(
                f"{self._checkpoint.name}: the tensor for {name} holds NaN or infinity: "
                "the checkpoint is damaged, fetch it again"
            )
        return part

    def _needed(self, wanted: Wanted) -> list[str]:
        """Targets that are to be read, under the names that the checkpoint has them."""
        tied = [twin for name, twin in self._tied_targets(wanted) if self._lacks(name)]
        return [*self._needed_targets(wanted), *tied]

    def _needed_targets(self, wanted: Wanted) -> list[str]:
        """Wanted targets but for packed ones that are here already."""
        return [it for it in self._steps if wanted(it) and not self._is_packed(it)]

    def _is_packed(self, name: str) -> bool:
        packed = self._packed_owner(name)
        return packed is not None and not packed[0].lacks(packed[1])

    def _packed_owner(self, name: str) -> tuple[Packed, str] | None:
        """The module that packs a parameter, and its name there; None if nobody does."""
        module, leaf = _owner(self._model, name)
        if isinstance(module, Packed) and leaf in module.packed_leaves:
            return module, leaf
        return None

    def _keys(self, target: str) -> list[str]:
        return [it for _, key in self._steps[target][1] for it in self._stored.parts(key)]

    def _converted(
        self,
        transform: Any,
        target: str,
        sources: list[tuple[str, str]],
        dtype: torch.dtype | None,
        progress: Progress | None,
    ) -> Tensor:
        """What transformers makes of some sources of one parameter."""
        for pattern, key in sources:
            transform.add_tensor(target, key, pattern, partial(self._read, key, dtype, progress))
        with torch.no_grad():
            (made,) = transform.convert(
                target, model=self._model, config=self._model.config
            ).values()
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

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
        dtype = self.dtype_of(like or target)
        if transform is None:
            return {target: self._read(sources[0][1], dtype, progress)}
        for pattern, key in sources:
            transform.add_tensor(target, key, pattern, partial(self._read, key, dtype, progress))
        with torch.no_grad():
            made = transform.convert(target, model=self._model, config=self._model.config)
        return {name: it[0] if isinstance(it, list) else it for name, it in made.items()}

    def _read(self, key: str, dtype: torch.dtype | None, progress: Progress | None) -> Tensor:
        if not self._mapped:
            return self._stored.read(key, dtype, progress)
        tensor = self._stored.map(key)
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    def _lacks(self, name: str) -> bool:
        """Whether a parameter has no value yet."""
        packed = self._packed_owner(name)
        if packed is not None:
            return packed[0].lacks(packed[1])
        module, leaf = _owner(self._model, name)
        value: Tensor | None = module._parameters.get(leaf)
        if value is None:
            value = module._buffers.get(leaf)
        return value is not None and value.is_meta

    def _assign(self, name: str, value: Tensor, device: torch.device) -> int:
        expected = tuple(self._shapes[name].shape)
        if tuple(value.shape) != expected:
            raise self._misshapen(name, tuple(value.shape))
        packed = self._packed_owner(name)
        module, leaf = _owner(self._model, name)
        if packed is not None:
            step = packed[0].part_length(leaf)
            for start in range(0, len(value), step):
                part = self._for_packing(packed[0], value[start : start + step], name)
                packed[0].take(leaf, start, part)
            return 0
        value = value.to(device).contiguous()
        value._is_hf_initialized = True  # type: ignore[attr-defined]
        if leaf in module._parameters:
            parameter = nn.Parameter(value, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            module._parameters[leaf] = parameter
        else:
            module._buffers[leaf] = value
        return value.numel() * value.dtype.itemsize

    def _misshapen(self, name: str, shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"{self._checkpoint.name}: tensor for {name} has shape {list(shape)}, "
            f"{self._name} with this config.json wants {list(self._shapes[name].shape)}"
        )


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give every buffer that no checkpoint stores (rotary tables, scales) its computed value.

    The models compute these in `_init_weights`, which leaves alone what is marked as loaded.
    """
    from transformers import initialization

    for path, module in model.named_modules():
        meta = [leaf for leaf, it in module._buffers.items() if it is not None and it.is_meta]
        if not meta:
            continue
        for leaf in meta:
            old = module._buffers[leaf]
            num_bytes = old.numel() * old.dtype.itemsize
            if num_bytes > _MAX_BUFFER_BYTES:
                raise ModelError(
                    f"config.json asks for a table {path}.{leaf} of shape {list(old.shape)}, "
                    f"{num_bytes} bytes, where {_MAX_BUFFER_BYTES} are the most: fetch it again"
                )
            module._buffers[leaf] = torch.zeros(old.shape, dtype=old.dtype, device=device)
        with torch.no_grad(), initialization.guard_torch_init_functions():
            model._init_weights(module)


def _one_by_one(
    transform: Any, sources: list[tuple[str, str]], shape: tuple[int, ...]
) -> list[list[tuple[str, str]]] | None:
    """The sources of each expert of a stacked parameter, where each can be made by itself.

    So it is where every expert has one tensor of each pattern, they are stacked first, and what
    follows leaves the first axis alone.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    first, *others = transform.operations
    if not isinstance(first, MergeModulelist) or first.dim != 0:
        return None
    for it in others:
        is_within = (isinstance(it, Concatenate) and it.dim > 0) or (
            isinstance(it, Transpose) and it.dim0 > 0 and it.dim1 > 0
        )
        if not is_within:
            return None
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for pattern, key in sources:
        by_pattern.setdefault(pattern, []).append((pattern, key))
    if any(len(it) != shape[0] for it in by_pattern.values()):
        return None
    return [list(it) for it in zip(*by_pattern.values(), strict=True)]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Sort key that puts expert 10 behind expert 9: stacked tensors keep their order."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in key.split(".")]


def _prefix_remover(
    model: nn.Module, architecture: Architecture, checkpoint: Iterable[str]
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
