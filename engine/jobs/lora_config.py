"""Which layers get an adapter, and what it is: the one definition of LoRA for every launch way.

By default every linear layer of the decoder, found by what modules are and not by what
architectures call them: torch's Linear, transformers' Conv1D, and quantized ones. The output
layer and the embeddings stay as they are, and in a mixture of experts the block that holds the
experts, its router with it. Knows no data and no training.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from engine.foreign_code import first_line
from engine.jobs.base_model import decoder_layers
from engine.jobs.settings import LoraSettings
from proto.errors import ModelError, UsageError

ALL_LINEAR: Final = "all-linear"
# bitsandbytes' own classes are subclasses of torch's Linear; named for those that are not.
_QUANTIZED: Final = {"Linear4bit", "Linear8bitLt"}


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that are adapted."""

    paths: tuple[str, ...]  # of modules, in the model's order
    counts: dict[str, int]  # last part of the path -> how many
    names: tuple[str, ...]  # what adapter_config.json says: short names where they are enough
    is_transposed: bool  # weights lie as (in, out)
    untouched: tuple[str, ...]  # matrices of the layers in no linear module, as stacked experts

    @property
    def sentence(self) -> str:
        """`q_proj x 8, v_proj x 8`."""
        return ", ".join(f"{name} x {count}" for name, count in self.counts.items())


def find_targets(model: Any, wanted: tuple[str, ...]) -> Targets:
    """Which modules to adapt.

    Args:
        wanted: names as peft takes them, `q_proj` or `layers.0.self_attn.q_proj`; empty or
            "all-linear" for all linear layers of the decoder.
    Raises:
        UsageError: a name fits no linear layer of the decoder; says which names there are.
        ModelError: the decoder has no linear layer.
    """
    path, layers = decoder_layers(model)
    linear = {
        f"{path}.{inner}": module for inner, module in layers.named_modules() if is_linear(module)
    }
    if not linear:
        raise ModelError(f"{type(model).__name__} has no linear layer in its decoder to adapt.")
    untouched = _untouched(layers, linear.values())
    names = tuple(name for name in wanted if name != ALL_LINEAR)
    if names:
        _check_names(model, names, list(linear))
        chosen = [it for it in linear if any(_fits(it, name) for name in names)]
    else:
        blocks = {it.partition(".")[0] for it in untouched}
        chosen = [it for it in linear if _block(it, path) not in blocks]
    transposed = {not isinstance(linear[it], nn.Linear) for it in chosen}
    if len(transposed) > 1:
        raise ModelError(
            f"{type(model).__name__} has linear layers of two kinds among those named."
        )
    return Targets(
        paths=tuple(chosen),
        counts=dict(Counter(it.rpartition(".")[2] for it in chosen)),
        names=_short_names(model, chosen),
        is_transposed=transposed.pop(),
        untouched=untouched,
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with one matrix."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__ in _QUANTIZED:
        return isinstance(getattr(module, "weight", None), torch.Tensor)
    return False


def adapt(model: Any, settings: LoraSettings, seed: int) -> Any:
    """Put adapters beside the chosen layers; all other weights stand still.

    Returns:
        peft's PeftModel, its adapter drawn from the seed, in float32 where the model is in half
        precision; it changes nothing until it has learnt.
    Raises:
        UsageError, ModelError: as `find_targets`.
    """
    from peft import get_peft_model

    targets = find_targets(model, settings.target_modules)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, lora_config(settings, targets))
        except (ValueError, TypeError) as exc:  # a layer of a kind that peft does not take
            raise ModelError(
                f"{type(model).__name__} cannot be adapted at {targets.sentence} "
                f"({first_line(exc)}): name other layers with --target-modules."
            ) from exc
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    if found != set(targets.paths):
        raise ModelError(
            f"peft adapts {len(found)} layers of {type(model).__name__} where {targets.sentence} "
            "were meant: name other layers with --target-modules."
        )
    return adapted


def lora_config(settings: LoraSettings, targets: Targets) -> Any:
    """The same, as peft's LoraConfig."""
    from peft import LoraConfig

    alpha = float(settings.alpha)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        # Programs that read adapter_config.json expect an integer where it is one.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=list(targets.names),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        fan_in_fan_out=targets.is_transposed,
        bias="none",
    )


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is learnt, by name, always in the same order."""
    return [(name, it) for name, it in model.named_parameters() if it.requires_grad]


def count_weights(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) weights; quantized ones count as what they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        count = parameter.numel() * (2 if packed else 1)
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _check_names(model: Any, names: tuple[str, ...], linear: list[str]) -> None:
    unknown = [name for name in names if not any(_fits(path, name) for path in linear)]
    if not unknown:
        return
    known = sorted({path.rpartition(".")[2] for path in linear})
    some = "" if len(unknown) == len(names) else f" ({len(names) - len(unknown)} other names do)"
    verb = "fits" if len(unknown) == 1 else "fit"
    raise UsageError(
        f"--target-modules: {', '.join(unknown)} {verb} no linear layer in the decoder of "
        f"{type(model).__name__}{some}; it has {', '.join(known)}. "
        "Leave the option out to adapt all of them."
    )


def _fits(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _short_names(model: nn.Module, chosen: list[str]) -> tuple[str, ...]:
    """Last parts of the paths where these name nothing else in the model, else whole paths."""
    leaves = tuple(sorted({it.rpartition(".")[2] for it in chosen}))
    every = {path for path, _ in model.named_modules() if any(_fits(path, it) for it in leaves)}
    return leaves if every == set(chosen) else tuple(chosen)


def _untouched(layers: nn.ModuleList, linear: Iterable[nn.Module]) -> tuple[str, ...]:
    """Matrices of the layers that belong to no linear module, by their names within a layer."""
    owned = {id(parameter) for module in linear for parameter in module.parameters()}
    names = {
        name.partition(".")[2]
        for name, parameter in layers.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in owned
    }
    return tuple(sorted(names))


def _block(path: str, layers_path: str) -> str:
    """ "mlp" of "model.layers.3.mlp.down_proj"."""
    inner = path.removeprefix(f"{layers_path}.")
    return inner.split(".")[1]
