"""A checkpoint's tensors as plain numbers, also where it stores them quantized.

Quantized checkpoints keep several tensors in a weight's place: packed integers, scales, zero
points. Here each such group is one tensor under the weight's own name, worked out in parts as it
is read; everything behind this file sees an ordinary checkpoint. Which layouts there are is said
by config.json's `quantization_config`; those that are not known are refused by name. Knows nothing
of models: which weight is whose is `engine.weights`'.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.safetensors_file import Progress
from engine.stored_compressed import compressed
from engine.stored_group import Finder, Group, plain, unknown_layout
from engine.stored_integers import awq, gptq
from engine.stored_scaled import fp8, mxfp4

_PART_BYTES: Final = 64 * 2**20  # of float32 numbers that are worked out at a time

_METHODS: Final[dict[str, Callable[[Finder], dict[str, Group]]]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "compressed-tensors": compressed,
    "mxfp4": mxfp4,
}


class StoredTensors:
    """What a checkpoint holds, under the names that its weights would have unquantized."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Find the groups; reads headers, no tensor.

        Raises:
            ModelError: the layout is not known, or does not hold together.
        """
        self._checkpoint = checkpoint
        config = quantization_of(checkpoint)
        self._groups: dict[str, Group] = {}
        self.method = ""  # what the numbers depend on beside the tensors
        if config is not None:
            self.method = json.dumps(config, sort_keys=True)
            self._groups = _METHODS[config["quant_method"]](Finder(checkpoint, config))
        hidden = {key for it in self._groups.values() for key in it.parts.values()}
        self._keys = [*self._groups, *(key for key in checkpoint if key not in hidden)]
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._keys)

    def parts(self, key: str) -> list[str]:
        """The stored tensors that one is made of."""
        group = self._groups.get(key)
        return [key] if group is None else list(group.parts.values())

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a tensor."""
        group = self._groups.get(key)
        return self._checkpoint.announced(key).shape if group is None else group.shape

    def dtype(self, key: str) -> torch.dtype:
        """Of a tensor as it comes: of numbers that are worked out, float32."""
        return torch.float32 if key in self._groups else self._checkpoint.announced(key).dtype

    def read(self, key: str, dtype: torch.dtype | None, progress: Progress | None) -> Tensor:
        """All of a tensor.

        Args:
            dtype: what numbers become; None leaves them as stored, or float32.
        """
        group = self._groups.get(key)
        if group is None:
            tensor = self._checkpoint.read(key, progress)
            is_number = dtype is not None and tensor.is_floating_point()
            return tensor.to(dtype) if is_number else tensor
        whole = torch.empty(group.shape, dtype=dtype or torch.float32)
        each = max(1, whole[0].numel() * 4)
        step = max(16, _PART_BYTES // each // 16 * 16)
        for start in range(0, len(whole), step):
            stop = min(start + step, len(whole))
            whole[start:stop] = self.read_part(key, start, stop, progress)
        return whole

    def read_part(self, key: str, start: int, stop: int, progress: Progress | None) -> Tensor:
        """Entries [start, stop) of a tensor's first axis, as stored or in float32.

        `start` is a multiple of 16, or the tensor has more than two axes. What is returned is good
        until the next part is read.
        """
        group = self._groups.get(key)
        if group is None:
            entry = self._checkpoint.entry(key)
            num_bytes = entry.num_bytes // max(1, entry.shape[0]) * (stop - start)
            buffer = self._buffer_of(num_bytes)
            return self._checkpoint.read_part(key, start, stop, progress, buffer)
        if self._held[0] != key:
            self._held = ("", {})  # before the next are read
            whole = {
                what: self._checkpoint.read(it, progress)
                for what, it in group.parts.items()
                if what not in group.by_entry
            }
            self._held = (key, whole)
        some = {
            what: self._checkpoint.read_part(group.parts[what], start, stop, progress)
            for what in group.by_entry
        }
        made = group.make({**self._held[1], **some}, start, stop)
        if stop >= group.shape[0]:
            self._held = ("", {})
        return made

    def _buffer_of(self, num_bytes: int) -> Tensor:
        """One piece of memory for all parts.

        Were each part's allocated and freed, the C library would keep some hundreds of megabytes.
        """
        if len(self._buffer) < num_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # before the next is there
            self._buffer = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        return self._buffer

    def map(self, key: str) -> Tensor:
        """A tensor as a mapping of its file; one that is stored quantized is read."""
        return self.read(key, None, None) if key in self._groups else self._checkpoint.map(key)


def quantization_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What config.json says of how weights are stored; None where they are plain.

    Raises:
        ModelError: in a way that is not known here; names it.
    """
    config = checkpoint.config_json.get("quantization_config")
    if not config:
        return None
    method = config.get("quant_method", "?") if isinstance(config, dict) else config
    if not isinstance(config, dict) or not isinstance(method, str) or method not in _METHODS:
        raise unknown_layout(checkpoint, plain(method))
    return config
