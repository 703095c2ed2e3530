"""What a checkpoint's config says of the model, and that model's own class on the meta device.

Knows no architecture by name: transformers' class for the config is taken as it is, its decoder
layers are found by their number, and whatever differs between architectures is read from the
config's standard fields. Reads no weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from engine import lean_imports
from engine.checkpoint import Checkpoint
from engine.foreign_code import first_line
from engine.json_file import shown
from engine.stored_quantized import quantization_of
from proto.errors import ModelError, ModelUnfit

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Kinds of decoder layers whose state is keys and values; any other kind keeps something else.
_STATEFUL_KINDS: Final = re.compile(r"linear|conv|mamba|ssm|recurrent|hybrid|rwkv|delta")
# Far beyond any model there is. What a config says decides how many modules are built, and how
# large what is made beside the weights: it is held against these before anything is.
_MOST: Final = {
    "num_hidden_layers": 4096,
    "hidden_size": 2**20,
    "vocab_size": 2**28,
    "num_experts": 2**16,
    "num_labels": 2**16,
    "max_position_embeddings": 2**31,
}
_LAYERS: Final = re.compile(r"(^|_)n?(um)?_?([a-z]+_)*(layers?|blocks|depth)$")
_LABELS: Final = re.compile(r"^num_labels$")
_EXPERTS: Final = re.compile(r"(^|_)(num|n)_([a-z]+_)*experts$")


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's language model: its config and class, and the sizes everybody needs."""

    name: str  # the class's name, for messages
    config: Any  # transformers config of the language part
    model_class: Any
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    dtype: torch.dtype  # what the checkpoint is stored in
    nested: bool  # the language model lies under a prefix of a larger (multimodal) checkpoint

    @property
    def rope_switch(self) -> int | None:
        """Length behind which LongRoPE takes its long factors (arXiv:2402.13753); else None."""
        for parameters in _rope_parameters(self.config):
            if parameters.get("rope_type", parameters.get("type")) == "longrope":
                original = parameters.get("original_max_position_embeddings") or getattr(
                    self.config, "original_max_position_embeddings", None
                )
                return self._length(original) if original else None
        return None

    @property
    def dynamic_rope_from(self) -> int | None:
        """Length behind which dynamic NTK rotary tables grow with the sequence; else None."""
        for parameters in _rope_parameters(self.config):
            if "dynamic" in str(parameters.get("rope_type", parameters.get("type"))):
                original = parameters.get("original_max_position_embeddings")
                return self._length(original) if original else self.max_context
        return None

    def _length(self, said: object) -> int:
        if isinstance(said, bool) or not isinstance(said, (int, float)) or not 1 <= said <= 2**31:
            raise ModelError(
                f"config.json of {self.name} has original_max_position_embeddings {shown(said)}: "
                "fetch it again"
            )
        return int(said)

    @property
    def num_experts(self) -> int | None:
        """Experts of a mixture-of-experts layer; None of a dense one."""
        return _first(self.config, "num_local_experts", "num_experts", "n_routed_experts")

    @property
    def active_expert_share(self) -> float:
        """Part of a mixture-of-experts layer's expert weights that one token uses; 1 if dense."""
        experts = self.num_experts
        used = _first(self.config, "num_experts_per_tok", "moe_topk", "top_k_experts")
        return min(1.0, used / experts) if experts and used else 1.0

    def build(self, dtype: torch.dtype, attention: str) -> Any:
        """The whole model on the meta device: every parameter has a shape and no memory."""
        config = copy.deepcopy(self.config)
        config.use_cache = False
        try:
            with torch.device("meta"), _WithoutValues():
                model = self.model_class._from_config(
                    config, attn_implementation=attention, dtype=dtype
                )
        except Exception as exc:  # whatever a model class raises on a config it cannot use
            if isinstance(exc, KeyError) and attention in str(exc):
                raise ModelUnfit(
                    f"{self.name} cannot be split: "
                    "it does not use transformers' attention interface"
                ) from exc
            raise ModelUnfit(f"{self.name} cannot be built: {first_line(exc)}") from exc
        return model.eval()


class _WithoutValues(TorchFunctionMode):
    """Leaves out the drawing of first values for what has no memory: it is work all the same."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Find transformers' class for a checkpoint's language model.

    Raises:
        ModelError: the config is not of a decoder that transformers knows, or of a kind that
            cannot be split.
    """
    lean_imports.prepare()
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    where = checkpoint.name
    kind = shown(checkpoint.config_json.get("model_type"))
    _refuse_own_code(checkpoint)
    _check_counts(checkpoint.config_json, where)
    quantization = quantization_of(checkpoint)
    try:
        whole = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as exc:  # whatever a config class raises on bad values
        raise ModelError(f"config.json of {where} cannot be used: {first_line(exc)}") from exc
    config = whole.get_text_config()
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{where} is an encoder-decoder ({kind[1:-1]}): only decoder-only models can be split"
        )
    if quantization is not None:
        # The model is built as it was before: weights become plain numbers when they are read.
        for it in (whole, config):
            if hasattr(it, "quantization_config"):
                del it.quantization_config
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(
            f"{where} is of type {kind}, for which transformers has no causal language model"
        ) from None
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if config is not whole and getattr(whole, "tie_word_embeddings", False):
        config.tie_word_embeddings = True  # said once, for the whole; the part must know it too
    name = model_class.__name__
    _refuse_other_state(config, name)
    num_layers, num_tensors = _required(config, name, "num_hidden_layers"), len(checkpoint)
    if num_layers > num_tensors:
        raise ModelError(
            f"config.json of {where} speaks of {num_layers} layers, and its weights are "
            f"{num_tensors} tensors: fetch it again"
        )
    return Architecture(
        name=name,
        config=config,
        model_class=model_class,
        num_layers=num_layers,
        hidden_size=_required(config, name, "hidden_size"),
        vocab_size=_required(config, name, "vocab_size"),
        max_context=_max_context(config),
        dtype=_stored_dtype(whole, config),
        nested=config is not whole,
    )


def _refuse_own_code(checkpoint: Checkpoint) -> None:
    """Say of a checkpoint that cannot do without its own code that it must."""
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config_json.get("model_type")
    if checkpoint.config_json.get("auto_map") and kind not in list(CONFIG_MAPPING.keys()):
        raise ModelError(
            f"{checkpoint.name} is of type {shown(kind)}, for which config.json names code of its "
            "own (auto_map): that is never run; take a checkpoint of a type that transformers knows"
        )


def _check_counts(config: dict[str, Any], where: str) -> None:
    """Refuse numbers of layers and experts by which modules would be built without end."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, where)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        for pattern, most in (
            (_LAYERS, _MOST["num_hidden_layers"]),
            (_EXPERTS, _MOST["num_experts"]),
            (_LABELS, _MOST["num_labels"]),
        ):
            if pattern.search(key) and not value <= most:
                raise ModelError(
                    f"config.json of {where} has {shown(key)} {value!r}, where {most} are the "
                    "most: fetch it again"
                )


def find_layers(model: nn.Module, architecture: Architecture) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its path, found by its length.

    Of several lists of that length (experts, say) the outermost is the decoder's.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == architecture.num_layers
    ]
    if not found:
        raise ModelUnfit(
            f"{architecture.name} has no list of {architecture.num_layers} decoder layers: "
            "it cannot be split by layers"
        )
    return min(found, key=lambda it: it[0].count("."))


def _refuse_other_state(config: Any, name: str) -> None:
    for layer, kind in enumerate(getattr(config, "layer_types", None) or []):
        if _STATEFUL_KINDS.search(str(kind)):
            raise ModelUnfit(
                f"{name} cannot be split: its layer {layer} is {kind!r}, which keeps "
                "state other than keys and values"
            )


def _max_context(config: Any) -> int:
    field = "max_position_embeddings"
    positions = getattr(config, field, None) or 2**20
    if not isinstance(positions, int) or not 1 <= positions <= _MOST[field]:
        raise ModelError(
            f"config.json has {field} {shown(positions)}, where 1 to {_MOST[field]} are possible: "
            "fetch it again"
        )
    # Llama 4 scales queries from this position on, but counts positions from the start of a step.
    floor = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", None) and isinstance(floor, int):
        return min(positions, floor - 1)
    return int(positions)


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(said, dict):
        return []
    nested = [it for it in said.values() if isinstance(it, dict)]
    return nested or [said]


def _stored_dtype(*configs: Any) -> torch.dtype:
    for config in configs:
        said = getattr(config, "dtype", None)
        dtype = DTYPES.get(str(said).removeprefix("torch."))
        if dtype is not None:
            return dtype
    return torch.float32


def _required(config: Any, name: str, field: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int) or not 1 <= value <= _MOST[field]:
        raise ModelError(
            f"config.json of {name} has no usable {field} (it says {shown(value)}, where 1 to "
            f"{_MOST[field]} are possible): fetch it again"
        )
    return value


def _first(config: Any, *fields: str) -> int | None:
    for field in fields:
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
