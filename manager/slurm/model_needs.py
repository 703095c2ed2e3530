"""How many nodes a model needs.

The rule: cut by whole layers into as few sections as possible, so that weights and KV of each,
with headroom of 20 %, fit the memory of one node, or of one GPU. Imports torch where the model is a
checkpoint (its layers are measured on the meta device); knows no Slurm command.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Final, Protocol

from manager.llama_server.gguf_file import read_model
from manager.llama_server.memory import context_of
from manager.plan import ModelPlan, make_plan
from manager.slurm.nodes import Node
from proto.errors import UsageError

# For activations, buffers of the links, Python and CUDA themselves.
HEADROOM: Final = 0.20


class Model(Protocol):
    """A model that can be cut into sections."""

    @property
    def name(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def context(self) -> int:
        """Tokens that the KV is for, over all sequences at once."""

    @property
    def weights_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    def largest_section_bytes(self, num_sections: int) -> int:
        """Weights and KV of the largest section, of so many."""


class CheckpointModel:
    """A checkpoint, cut as the workers will cut it."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        context: int | None,
        quantize: str = "none",
        kv_quantize: str = "none",
    ) -> None:
        self._model, self._dtype, self._context = model, dtype, context
        self._quantize, self._kv_quantize = quantize, kv_quantize

    @cached_property
    def _whole(self) -> ModelPlan:
        return self._plan(1)

    @property
    def name(self) -> str:
        return self._whole.model

    @property
    def num_layers(self) -> int:
        return self._whole.num_layers

    @property
    def context(self) -> int:
        return self._whole.context

    @property
    def weights_bytes(self) -> int:
        return self._whole.weights_bytes

    @property
    def kv_bytes(self) -> int:
        return sum(section.kv_bytes for section in self._whole.sections)

    def largest_section_bytes(self, num_sections: int) -> int:
        sections = self._plan(num_sections).sections
        return max(section.weights_bytes + section.kv_bytes for section in sections)

    def _plan(self, num_sections: int) -> ModelPlan:
        return make_plan(
            self._model,
            num_sections,
            dtype=self._dtype,
            quantize=self._quantize,
            kv_quantize=self._kv_quantize,
            context=self._context,
        )


class GgufModel:
    """A .gguf file, which llama-server spreads over its rpc-servers by layers."""

    def __init__(self, path: Path, *, context: int | None) -> None:
        self._file = read_model(path)
        self.name = self._file.name
        self.num_layers = max(1, self._file.num_layers)
        self.context = context_of(self._file, context)
        self.weights_bytes = self._file.weight_bytes
        self.kv_bytes = self._file.kv_bytes_per_token * self.context

    def largest_section_bytes(self, num_sections: int) -> int:
        share = ceil(self.num_layers / num_sections) / self.num_layers
        return ceil((self.weights_bytes + self.kv_bytes) * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model needs of some nodes."""

    model: str
    weights_bytes: int
    kv_bytes: int
    context: int  # tokens that the KV is for
    place: str  # what holds one section: "node" or "GPU"
    largest_place_bytes: int
    # Of the largest section, with headroom; where the model does not fit, in as many sections as
    # there are places and layers.
    section_bytes: int
    num_sections: int
    num_nodes: int | None  # None: all of them together do not hold it
    place_bytes: int | None  # the least place that is large enough
    idle_nodes: int  # large enough, and idle now
    fits_now: bool


def open_model(
    model: str,
    *,
    dtype: str,
    context: int | None,
    quantize: str = "none",
    kv_quantize: str = "none",
) -> Model:
    """The model that `--model` names, as workers with these options will hold it.

    Raises:
        ModelError: it is missing, damaged, or of a kind that cannot be run.
    """
    if model.endswith(".gguf"):
        return GgufModel(Path(model).expanduser(), context=context)
    return CheckpointModel(
        model, dtype=dtype, context=context, quantize=quantize, kv_quantize=kv_quantize
    )


def needs(model: Model, nodes: Sequence[Node], *, gpu_bytes: int | None) -> Need:
    """Cut the model for these nodes.

    Args:
        nodes: one of them at least has memory.
        gpu_bytes: of one GPU, each of which holds a section; None: as the names of the GPUs' types
            tell, and where they do not, a node holds a section in its main memory.
    Raises:
        UsageError: there is no node that could hold anything.
    """
    usable = [node for node in nodes if node.is_usable]
    on_gpus = gpu_bytes is not None or any(node.gpu_memory_bytes for node in usable)
    places = {
        node.name: _gpus_of(node, gpu_bytes) if on_gpus else [node.memory_bytes] for node in usable
    }
    sizes = [size for sizes in places.values() for size in sizes]
    if not sizes:
        raise UsageError(
            "no node here that takes jobs has a GPU: leave --gpu-memory away to reckon with main "
            "memory, or pass another --partition."
            if usable
            else "no node here takes jobs now: pass another --partition."
        )
    num_sections, section_bytes, fits = fit(model, sizes)
    room = {name: sum(it >= section_bytes for it in sizes) for name, sizes in places.items()}
    idle = [room[node.name] for node in usable if node.is_idle and room[node.name]]
    num_nodes = nodes_for(num_sections, list(room.values())) if fits else None
    return Need(
        model=model.name,
        weights_bytes=model.weights_bytes,
        kv_bytes=model.kv_bytes,
        context=model.context,
        place="GPU" if on_gpus else "node",
        largest_place_bytes=max(sizes),
        section_bytes=section_bytes,
        num_sections=num_sections,
        num_nodes=num_nodes,
        place_bytes=min((it for it in sizes if it >= section_bytes), default=None),
        idle_nodes=len(idle),
        fits_now=fits and nodes_for(num_sections, idle) is not None,
    )


def fit(model: Model, places: Sequence[int]) -> tuple[int, int, bool]:
    """Cut the model into as few sections as these places hold, which have so many bytes each.

    Returns:
        (number of sections, bytes of the largest with headroom, whether that fits)
    """
    most = min(model.num_layers, len(places))
    # No cut is finer than the mean, so that many sections are needed at least.
    all_bytes = with_headroom(model.weights_bytes + model.kv_bytes)
    for num_sections in range(min(most, ceil(all_bytes / max(1, max(places)))) or 1, most + 1):
        section_bytes = with_headroom(model.largest_section_bytes(num_sections))
        if sum(place >= section_bytes for place in places) >= num_sections:
            return num_sections, section_bytes, True
    return most, section_bytes, False


def with_headroom(num_bytes: int) -> int:
    """Bytes that must be there for so many."""
    return ceil(num_bytes * (1 + HEADROOM))


def nodes_for(num_sections: int, room: Sequence[int]) -> int | None:
    """How many nodes hold so many sections, the roomiest first; None: all of them do not.

    Args:
        room: for each node, how many sections it holds.
    """
    left = num_sections
    for used, held in enumerate(sorted(room, reverse=True), start=1):
        left -= held
        if left <= 0:
            return used
    return None


def _gpus_of(node: Node, gpu_bytes: int | None) -> list[int]:
    size = gpu_bytes if gpu_bytes is not None else node.gpu_memory_bytes
    return [size] * node.gpus if size is not None else []
