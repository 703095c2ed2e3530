"""Put AxoNN's sharded layers in the place of the linear layers that adapters stand beside.

peft does not know AxoNN's layers, so the adapters come first; they stay whole on every process.
What is sharded are the base weights below them, which stand still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.jobs.axonn_grid import Grid
from engine.jobs.axonn_library import intra_layer
from proto.errors import ModelError, UsageError


@dataclass(frozen=True, slots=True)
class Shards:
    """What was sharded, and what was not."""

    num_layers: int
    sharded_weights: int  # of all layers that were sharded, whole
    held_weights: int  # of this process, of the whole model
    total_weights: int
    whole: tuple[str, ...]  # kinds of adapted layers that do not divide, with their sizes

    def sentences(self, grid: Grid) -> list[str]:
        """For people."""
        share = 100 * self.sharded_weights / max(self.total_weights, 1)
        parts = "one piece" if grid.tensor == 1 else f"{grid.tensor} shards by {grid.axis}"
        said = [
            f"AxoNN holds {self.num_layers} layers ({share:.3g} % of the weights) in "
            f"{parts}: {self.held_weights:,} of "
            f"{self.total_weights:,} weights on each rank"
        ]
        if self.whole:
            said.append(
                f"left whole, as {grid.tensor} by {grid.axis} does not divide them: "
                f"{', '.join(self.whole)}"
            )
        return said


def shard(model: Any, grid: Grid) -> Shards:
    """Replace the base layer of every adapted layer by AxoNN's, with this process's part of it.

    Args:
        model: a PeftModel on the CPU, the same on every process; changed in place.
    Raises:
        ModelError: there is nothing that could be sharded.
        UsageError: nothing divides, or a layer that not every process uses at each step.
    """
    adapted = list(_adapted(model))
    linear = [(path, it) for path, it in adapted if type(it.base_layer) is nn.Linear]
    if not linear:
        kinds = sorted({type(it.base_layer).__name__ for _, it in adapted})
        raise ModelError(
            f"AxoNN would shard nothing of {_name(model)}: it takes torch.nn.Linear, and the "
            f"adapted layers are {' and '.join(kinds) or 'none'}; use manager finetune lora or "
            "sft, which take them as they are."
        )
    _check_all_are_used(linear)
    total = sum(it.numel() for it in model.parameters())
    sharded, whole = 0, Counter[str]()
    for path, layer in linear:
        base = layer.base_layer
        if grid.divides(base.in_features, base.out_features):
            sharded += sum(it.numel() for it in base.parameters())
            layer.base_layer = _sharded(base)
        else:
            whole[f"{path.rpartition('.')[2]} ({base.out_features} x {base.in_features})"] += 1
    left = tuple(f"{name} x {count}" for name, count in whole.items())
    if not sharded:
        raise UsageError(
            f"AxoNN would shard nothing of {_name(model)}: --tensor-parallelism {grid.tensor} by "
            f"{grid.axis} divides none of {', '.join(left)}; take another number or another "
            "--parallelism-axis."
        )
    held = sum(it.numel() for it in model.parameters())
    return Shards(len(linear) - whole.total(), sharded, held, total, left)


def gather_weight(layer: Any) -> Tensor:
    """The whole matrix of one of AxoNN's layers; every process of the run has to call it.

    Returns:
        (outputs, inputs), on the layer's device.
    """
    parts = layer.depth_group_size
    flat = _all_gather(layer.weight.detach(), layer.depth_group, parts, dim=0)
    local = flat.view(layer.local_out_features, layer.local_in_features)
    wide = _all_gather(local, layer.inner_group, layer.inner_group_size, dim=1)
    return _all_gather(wide, layer.outer_group, layer.outer_group_size, dim=0)


def is_sharded(module: nn.Module) -> bool:
    """Whether it is AxoNN's."""
    return isinstance(module, intra_layer().Linear)


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield path, module


def _sharded(base: nn.Linear) -> nn.Module:
    layer: nn.Module = intra_layer().Linear(
        base.in_features, base.out_features, bias=base.bias is not None, init_method=_as_it_is
    )
    layer.load_state_dict(base.state_dict())
    layer.to(base.weight.dtype).requires_grad_(False)
    for parameter in layer.parameters():
        # A part of a whole matrix would keep the whole one in memory.
        parameter.data = parameter.data.clone()
    return layer


def _as_it_is(weight: Tensor) -> Tensor:
    """Weights come from the checkpoint: random ones would take time, and random numbers."""
    return weight


def _check_all_are_used(linear: list[tuple[str, Any]]) -> None:
    """AxoNN's layers wait for one another: a layer that a process skips stops all of them."""
    for path, _ in linear:
        if ".experts." in path:
            raise UsageError(
                f"--target-modules: {path.removeprefix('base_model.model.')} belongs to an "
                "expert, which not every rank uses at each step: AxoNN cannot shard it; name "
                "other layers, or use manager finetune lora or sft."
            )


def _all_gather(part: Tensor, group: Any, size: int, dim: int) -> Tensor:
    if size == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def _name(model: Any) -> str:
    return type(model.get_base_model()).__name__
