"""Whether an adapter belongs to a model: every matrix has its layer there, of its size.

peft itself passes over matrices that fit nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from engine.foreign_code import first_line
from proto.errors import UsageError

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
# Around a module of which several parameters are adapted, peft lays one wrapper each.
_WRAPPED: Final = ".base_layer"


def check_fit(model: nn.Module, config: Mapping[str, Any], adapter: Path, model_name: str) -> None:
    """Every matrix of the adapter has its layer in the model, of its size.

    Args:
        config: the adapter's.
        adapter: its folder.
    Raises:
        UsageError: one has not.
    """
    modules = dict(model.named_modules())
    parameters = [str(it) for it in config.get("target_parameters") or ()]
    for key, shape in _shapes(adapter).items():
        path, side = _layer_of(key)
        if side is None:
            continue
        weights = _adapted_at(path, modules, parameters)
        if not weights:
            raise UsageError(
                f"the adapter {adapter} is for another model: it has weights for {path}, and "
                f"{model_name} has no such layer."
            )
        found = shape[1] if side == "A" else shape[0]
        widths = {width for weight in weights for width in _widths(weight, side)}
        if widths and found not in widths:
            raise UsageError(
                f"the adapter {adapter} is for another model: at {path} it is {found} wide, and "
                f"the layer of {model_name} {' or '.join(map(str, sorted(widths)))}."
            )


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    try:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except Exception as exc:  # safetensors' own errors
        raise UsageError(
            f"{adapter / ADAPTER_WEIGHTS} is damaged ({first_line(exc)}): copy it again."
        ) from exc


def _adapted_at(
    path: str, modules: Mapping[str, nn.Module], parameters: Sequence[str]
) -> list[tuple[nn.Module, nn.Parameter]]:
    """What a matrix may be for: a layer's weight, or stacked experts' that the config names."""
    module = modules.get(path)
    weight = getattr(module, "weight", None)
    if module is not None and isinstance(weight, nn.Parameter):
        return [(module, weight)]
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED)
    module = modules.get(path)
    if module is None:
        return []
    return [
        (module, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if any(f".{path}.{name}".endswith(f".{it}") for it in parameters)
    ]


def _widths(weight: tuple[nn.Module, nn.Parameter], side: str) -> set[int]:
    """How wide a matrix of this side may be; empty where that is not known."""
    module, parameter = weight
    if parameter.ndim == 3:  # (experts, outputs, inputs), or the other way round
        return set(parameter.shape[1:])
    if parameter.ndim != 2:
        return set()
    outputs, inputs = parameter.shape
    if hasattr(module, "nf"):  # transformers' Conv1D has them the other way round
        outputs, inputs = inputs, outputs
    elif not hasattr(module, "in_features") and not hasattr(module, "num_embeddings"):
        return {inputs, outputs}
    return {inputs if side == "A" else outputs}


def _layer_of(key: str) -> tuple[str, str | None]:
    """Module path and matrix of `base_model.model.<path>.lora_A.weight`."""
    path = key.removeprefix("base_model.model.")
    for side in ("A", "B"):
        if path.endswith(f".lora_{side}.weight"):
            return path.removesuffix(f".lora_{side}.weight"), side
    return path, None
