"""Decide which modules of a stage are packed, and put packed ones in their places.

Whatever is linear is packed: found by what a module does, by no architecture's names. What is not
(norms, biases, routers, which are small and sensitive; experts of a kind of their own) stays as the
checkpoint has it, and is counted. Reads no weights: `engine.weights` fills what is put here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from engine.adapter_places import is_linear, linear_shape
from engine.architecture import Architecture, find_layers
from engine.experts import PackedExperts, can_pack
from engine.kernels import native
from engine.kernels.packed import PackedMatrix
from engine.packed_linear import (
    Fused,
    Packed,
    PackedLinear,
    fusable,
    fused_of,
)
from engine.plan import LayerSizes
from proto.errors import UsageError

QUANTIZATIONS: Final = ("none", "int8", "int4")
HEADS: Final = ("auto", "int8", "same")
COMPRESSIONS: Final = ("auto", "on", "off")
# Below these a matrix is not worth its padding, nor what its rounding costs.
_MIN_COLS: Final = 32
_MIN_ROWS: Final = 16


@dataclass(frozen=True, slots=True)
class Packing:
    """In which format matrices are held."""

    layers: str  # "bf16", "bf12", "int8" or "int4"
    head: str  # of the lm_head

    @property
    def is_lossy(self) -> bool:
        """Whether weights are rounded."""
        return self.layers not in ("bf16", "bf12")


@dataclass(slots=True)
class PackedParts:
    """What of a stage is packed."""

    packing: Packing | None
    modules: dict[str, Packed] = field(default_factory=dict)  # by path
    fused: list[Fused] = field(default_factory=list)
    left_bytes: int = 0  # of matrices that stay as they are
    left_example: str = ""  # one of them
    fetched_bytes: int = 0  # that were packed at an earlier start

    @property
    def packed_bytes(self) -> int:
        """Held by all packed modules."""
        return sum(it.packed_bytes for it in self.modules.values())

    def read_as_weights(self) -> list[str]:
        """Paths of linear modules whose weight something asked for instead of calling them."""
        linear = [(it, module) for it, module in self.modules.items()]
        return [
            path
            for path, module in linear
            if isinstance(module, PackedLinear) and module.weight_reads
        ]

    def finish(self) -> None:
        """Tie up what needs all weights to be there."""
        for it in self.fused:
            it.join_biases()


def choose_packing(
    quantize: str, head: str, dtype: torch.dtype, device: torch.device, compress: str = "off"
) -> Packing | None:
    """The formats for what was asked; None leaves all modules as they are.

    Args:
        quantize: "none", "int8" or "int4".
        head: "int8", "same" as the layers, or "auto", which is int8.
        compress: whether 16 bits are held in 12, exactly: "on", "off", or "auto", which is where
            that is the faster of the two.
    """
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"--quantize {quantize!r}: choose {', '.join(QUANTIZATIONS)}")
    if head not in HEADS:
        raise UsageError(f"--quantize-head {head!r}: choose {', '.join(HEADS)}")
    if compress not in COMPRESSIONS:
        raise UsageError(f"--compress {compress!r}: choose {', '.join(COMPRESSIONS)}")
    if quantize != "none":
        return Packing(quantize, quantize if head == "same" else "int8")
    if dtype == torch.bfloat16 and device.type == "cpu" and native.library is not None:
        # The same bits, which our own kernels read faster.
        is_compressed = compress == "on" or (compress == "auto" and native.reads_bf12_best())
        return Packing(*["bf12" if is_compressed else "bf16"] * 2)
    return None


def put_packed(
    model: Any,
    architecture: Architecture,
    packing: Packing | None,
    device: torch.device,
    is_own: Callable[[str], bool],
    dtype_of: Callable[[str], torch.dtype],
) -> PackedParts:
    """Replace a stage's linear modules, and its experts, by packed ones that wait for weights.

    Args:
        model: on the meta device, with all its layers.
        is_own: whether the stage holds the module at a path.
        dtype_of: what a parameter is held in otherwise; some must stay in float32.
    """
    parts = PackedParts(packing)
    if packing is None:
        return parts
    head = model.get_output_embeddings()
    formats: dict[nn.Module, str] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in list(model.named_modules()):
        if not (path and is_own(path)):
            continue
        if can_pack(module):
            parts.modules[path] = experts = PackedExperts(module, packing.layers, device)
            _put(model, path, experts)
        elif _is_packable(module, architecture, dtype_of(f"{path}.weight"), packing):
            formats[module] = packing.head if module is head else packing.layers
            paths[module] = path
        else:
            _count_left(parts, path, module)
    for parent in {_parent(model, path): None for path in paths.values()}:
        for name, names in list(fusable(parent, formats)):
            fused_of(parent)[name] = _put_fused(parent, names, formats, parts, paths, device)
    for module, path in paths.items():
        if path not in parts.modules:
            rows, cols = linear_shape(module)[::-1]
            matrix = PackedMatrix.allocate(formats[module], rows, cols, device)
            parts.modules[path] = _packed(module, matrix)
    for path, module in parts.modules.items():
        _put(model, path, module)
    return parts


def held_sizes(
    model: Any, architecture: Architecture, packing: Packing, plain: LayerSizes
) -> tuple[list[int], int]:
    """How many bytes each layer, and what follows the last one, would take packed.

    Args:
        model: on the meta device; as it was when this returns.
        plain: the same model's sizes as it is.
    """
    packed = packed_size(packing, architecture, model)
    path, layers = find_layers(model, architecture)
    layer_bytes = [
        sum(
            packed.get(f"{path}.{index}.{name}", it.numel() * it.dtype.itemsize)
            for name, it in layer.named_parameters()
        )
        for index, layer in enumerate(layers)
    ]
    after = [
        packed[f"{name}.weight"] - module.weight.numel() * module.weight.dtype.itemsize
        for name, module in model.named_modules()
        if f"{name}.weight" in packed and not name.startswith(f"{path}.")
    ]
    return layer_bytes, plain.head_bytes + sum(after)


def packed_size(packing: Packing, architecture: Architecture, model: Any) -> dict[str, int]:
    """How many bytes each parameter that would be packed takes then, by name.

    Args:
        model: on the meta device; as it was when this returns.
    """
    sizes: dict[str, int] = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if can_pack(module):
            first = "gate_up_proj" if module.has_gate else "up_proj"
            for leaf in (first, "down_proj"):
                count, rows, cols = module._parameters[leaf].shape
                rows, cols = (cols, rows) if module.is_transposed else (rows, cols)
                sizes[f"{path}.{leaf}"] = count * PackedMatrix.num_bytes_of(
                    packing.layers, rows, cols
                )
        elif _is_packable(module, architecture, module_dtype(module), packing):
            rows, cols = linear_shape(module)[::-1]
            chosen = packing.head if module is head else packing.layers
            sizes[f"{path}.weight"] = PackedMatrix.num_bytes_of(chosen, rows, cols)
    return sizes


def module_dtype(module: nn.Module) -> torch.dtype:
    """What a module's weight is held in."""
    weight = module._parameters.get("weight")
    return torch.float32 if weight is None else weight.dtype


def _is_packable(
    module: nn.Module, architecture: Architecture, dtype: torch.dtype, packing: Packing
) -> bool:
    if not is_linear(module) or isinstance(module, PackedLinear):
        return False
    weight = module.weight
    if dtype != weight.dtype:  # this model keeps it in float32 for a reason
        return False
    in_features, out_features = linear_shape(module)
    # One row an expert: a router. Its rounding would send tokens to other experts.
    return (
        in_features >= _MIN_COLS
        and out_features >= _MIN_ROWS
        and out_features != architecture.num_experts
    )


def _count_left(parts: PackedParts, path: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if parameter.ndim >= 2 and "bias" not in leaf:
            parts.left_bytes += parameter.numel() * parameter.dtype.itemsize
            if parameter.ndim > 2 or not parts.left_example:
                parts.left_example = f"{path}.{leaf}"


def _put_fused(
    parent: nn.Module,
    names: tuple[str, ...],
    formats: dict[nn.Module, str],
    parts: PackedParts,
    paths: dict[nn.Module, str],
    device: torch.device,
) -> Fused:
    told: list[Any] = [parent._modules[name] for name in names]
    sizes = tuple(it.out_features for it in told)
    matrix = PackedMatrix.allocate(formats[told[0]], sum(sizes), told[0].in_features, device)
    members, row = [], 0
    for it in told:
        member = _packed(it, matrix.part(row, row + it.out_features))
        row += it.out_features
        parts.modules[paths[it]] = member
        members.append(member)
    together = Fused(matrix, sizes, tuple(members))
    parts.fused.append(together)
    return together


def _packed(module: nn.Module, matrix: PackedMatrix) -> PackedLinear:
    return PackedLinear(module, matrix, is_transposed=not isinstance(module, nn.Linear))


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    setattr(_parent(model, path), path.rpartition(".")[2], module)
