"""Decide which layers a section holds, from nothing but the checkpoint's config.

Every worker works this out for itself and must come to the same answer, also where it has only
its own shards: so sizes are those of the model on the meta device, not of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engine.architecture import Architecture, find_layers
from engine.sections import parse_layers, split_layers
from proto.errors import SplitError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """How large the parts of a model are, in bytes of the dtype it was built with."""

    layer_bytes: tuple[int, ...]
    layer_work: tuple[float, ...]  # bytes that one token's step reads; experts only in part
    head_bytes: int  # final norm and lm_head, held by the last section
    embedding_bytes: int  # held by the manager

    @property
    def costs(self) -> tuple[list[float], float]:
        """What to balance: memory and work in equal parts; (per layer, head)."""
        all_bytes = sum(self.layer_bytes) + self.head_bytes
        all_work = sum(self.layer_work) + self.head_bytes
        layers = [
            held / all_bytes + read / all_work
            for held, read in zip(self.layer_bytes, self.layer_work, strict=True)
        ]
        return layers, self.head_bytes / all_bytes + self.head_bytes / all_work


def layer_sizes(model: Any, architecture: Architecture) -> LayerSizes:
    """Measure a model on the meta device."""
    path, layers = find_layers(model, architecture)
    share = architecture.active_expert_share
    head = model.get_output_embeddings()
    embeddings = {
        id(it.weight): it
        for name, it in model.named_modules()
        if isinstance(it, nn.Embedding) and not name.startswith(f"{path}.")
    }
    inside = {id(it) for it in layers.parameters()}
    outside = {id(it): it for it in model.parameters() if id(it) not in inside}
    tail = [it for key, it in outside.items() if key not in embeddings]
    if head is not None and id(head.weight) in embeddings:
        tail.append(head.weight)  # tied: the last section holds a copy
    return LayerSizes(
        layer_bytes=tuple(sum(map(_bytes, layer.parameters())) for layer in layers),
        layer_work=tuple(
            # Stacked expert weights are the only parameters with three axes.
            sum(_bytes(it) * (share if it.ndim == 3 else 1.0) for it in layer.parameters())
            for layer in layers
        ),
        head_bytes=sum(map(_bytes, tail)),
        embedding_bytes=sum(_bytes(it.weight) for it in embeddings.values()),
    )


def plan_section(
    model: Any,
    architecture: Architecture,
    *,
    layers: tuple[int, int] | str | None = None,
    sections: int | None = None,
    index: int | None = None,
) -> tuple[int, int]:
    """The layers [start, end) that were asked for, by range or by section number.

    Raises:
        UsageError, SplitError: no such section; says which there are.
    """
    if layers is not None:
        if sections is not None or index is not None:
            raise UsageError("--layers takes the place of --sections and --index: pass one of them")
        text = layers if isinstance(layers, str) else f"{layers[0]}:{layers[1]}"
        section = parse_layers(text, architecture.num_layers)
        return section.start, section.end
    if sections is None or index is None:
        raise UsageError("pass --sections N and --index I, or --layers A:B")
    if not 0 <= index < sections:
        raise SplitError(
            f"--index {index} is out of range: {sections} sections are numbered 0 to {sections - 1}"
        )
    costs, head_cost = layer_sizes(model, architecture).costs
    section = split_layers(costs, sections, head_cost)[index]
    return section.start, section.end


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.dtype.itemsize
