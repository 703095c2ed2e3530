"""What a checkpoint's config says of the model, and that model's own class on the meta device.

Knows no architecture by name: transformers' class for the config is taken as it is, its decoder
layers are found by their number, and whatever differs between architectures is read from the
config's standard fields. Reads no weights.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from engine.checkpoint import Checkpoint
from engine.stored_quantized import quantization_of
from proto.errors import ModelError, ModelUnfit

DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Kinds of decoder layers whose state is keys and values; any other kind keeps something else.
_STATEFUL_KINDS: Final = re.compile(r"linear|conv|mamba|ssm|recurrent|hybrid|rwkv|delta")


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
                return int(original) if original else None
        return None

    @property
    def dynamic_rope_from(self) -> int | None:
        """Length behind which dynamic NTK rotary tables grow with the sequence; else None."""
        for parameters in _rope_parameters(self.config):
            if "dynamic" in str(parameters.get("rope_type", parameters.get("type"))):
                return int(parameters.get("original_max_position_embeddings") or self.max_context)
        return None

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
            with torch.device("meta"):
                model = self.model_class._from_config(
                    config, attn_implementation=attention, dtype=dtype
                )
        except KeyError as exc:
            raise ModelUnfit(
                f"{self.name} cannot be split: it does not use transformers' attention interface"
            ) from exc
        except Exception as exc:  # whatever a model class raises on a config it cannot use
            raise ModelUnfit(f"{self.name} cannot be built: {first_line(exc)}") from exc
        return model.eval()


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Find transformers' class for a checkpoint's language model.

    Raises:
        ModelError: the config is not of a decoder that transformers knows, or of a kind that
            cannot be split.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    where = checkpoint.name
    kind = checkpoint.config_json.get("model_type", "?")
    try:
        whole = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as exc:  # whatever a config class raises on bad values
        raise ModelError(f"config.json of {where} cannot be used: {first_line(exc)}") from exc
    config = whole.get_text_config()
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{where} is an encoder-decoder ({kind}): only decoder-only models can be split"
        )
    if quantization_of(checkpoint) is not None:
        # The model is built as it was before: weights become plain numbers when they are read.
        for it in (whole, config):
            if hasattr(it, "quantization_config"):
                del it.quantization_config
    try:
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ModelError(
            f"{where} is of type {kind!r}, for which transformers has no causal language model"
        ) from None
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if config is not whole and getattr(whole, "tie_word_embeddings", False):
        config.tie_word_embeddings = True  # said once, for the whole; the part must know it too
    name = model_class.__name__
    _refuse_other_state(config, name)
    return Architecture(
        name=name,
        config=config,
        model_class=model_class,
        num_layers=_required(config, name, "num_hidden_layers"),
        hidden_size=_required(config, name, "hidden_size"),
        vocab_size=_required(config, name, "vocab_size"),
        max_context=_max_context(config),
        dtype=_stored_dtype(whole, config),
        nested=config is not whole,
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
    positions = getattr(config, "max_position_embeddings", None) or 2**20
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
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json of {name} has no usable {field} (it says {value!r})")
    return value


def _first(config: Any, *fields: str) -> int | None:
    for field in fields:
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def first_line(exc: BaseException) -> str:
    """What to quote of foreign code's error in a sentence of ours."""
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
