"""Save what was trained: the adapter, and the base model with the adapter added to its weights.

One way for LoRA, SFT and AxoNN, called by the first process alone. The merged model is made of the
base as it is on disk, in its own dtype, and of the adapter as it was saved: so it does not matter
how the training model was sharded or quantized. Folders appear whole or not at all.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from engine.checkpoint import Checkpoint
from engine.foreign_code import first_line
from engine.jobs.base_model import (
    Placement,
    copy_tokenizer,
    load_base,
    quiet_transformers,
    reference,
)
from engine.jobs.fit import ADAPTER_WEIGHTS, check_fit
from engine.jobs.folders import write_folder
from proto.errors import ModelError, UsageError

ADAPTER_CONFIG: Final = "adapter_config.json"
MAX_SHARD: Final = "5GB"


def save_adapter(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the adapter as peft does, with the base model's tokenizer beside it.

    Args:
        model: a PeftModel whose adapters are whole on this process.
        folder: replaced if it is there.
    Raises:
        Error: it cannot be written.
    """

    def fill(partial: Path) -> None:
        model.peft_config["default"].base_model_name_or_path = reference(checkpoint)
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            model.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)
        copy_tokenizer(checkpoint, partial)

    write_folder(folder, fill)


def save_adapter_weights(
    weights: Mapping[str, torch.Tensor], config: Any, checkpoint: Checkpoint, folder: Path
) -> None:
    """The same from an adapter's tensors, for whoever has them apart from the model.

    Args:
        weights: under peft's names, `base_model.model.<path>.lora_A.weight`.
        config: peft's LoraConfig.
    """
    from safetensors.torch import save_file

    def fill(partial: Path) -> None:
        config.base_model_name_or_path = reference(checkpoint)
        config.inference_mode = True
        config.save_pretrained(partial)
        whole = {name: it.detach().cpu().contiguous() for name, it in weights.items()}
        save_file(whole, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        copy_tokenizer(checkpoint, partial)

    write_folder(folder, fill)


def save_merged(checkpoint: Checkpoint, adapter: Path, folder: Path) -> None:
    """Add an adapter to its base model, and write that as an ordinary checkpoint.

    Takes as much memory as the base model in its own dtype.

    Args:
        checkpoint: of the base model.
        adapter: a folder that holds one.
        folder: replaced if it is there.
    Raises:
        UsageError: the adapter is missing, damaged, or does not fit the model.
        Error: there is not enough memory, or the folder cannot be written.
    """
    check_adapter(adapter)
    dtype = stored_dtype(checkpoint)
    model = load_base(checkpoint, Placement(torch.device("cpu"), dtype))
    merged = merge(model, adapter, checkpoint.name)

    def fill(partial: Path) -> None:
        with quiet_transformers():
            merged.save_pretrained(partial, max_shard_size=MAX_SHARD)
        copy_tokenizer(checkpoint, partial)

    write_folder(folder, fill)


def merge(model: Any, adapter: Path, model_name: str) -> Any:
    """The model with the adapter added to its weights, in place.

    Raises:
        UsageError: the adapter does not fit the model; says where.
    """
    from peft import PeftModel

    check_fit(model, check_adapter(adapter), adapter, model_name)
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        try:
            adapted: Any = PeftModel.from_pretrained(model, str(adapter))
            merged = adapted.merge_and_unload()
        except Exception as exc:  # peft's errors on adapters of other kinds, or with other options
            raise UsageError(
                f"the adapter {adapter} cannot be added to {model_name}: {first_line(exc)}"
            ) from exc
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(
                f"the adapter {adapter} makes {name} of {model_name} infinite or no number: it did "
                "not learn well; train again with a lower --learning-rate."
            )
    return merged


def check_adapter(adapter: Path) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        UsageError: there is no adapter there, or none that was made by LoRA.
    """
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise UsageError(
            f"{adapter} holds no {ADAPTER_CONFIG}: name a folder that peft or "
            "`manager finetune` saved an adapter in."
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as exc:
        raise UsageError(f"{path} cannot be read ({exc}).") from exc
    if kind != "LORA":
        raise UsageError(f"{path} is of type {kind!r}: LORA is what can be added to a model.")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UsageError(
            f"{adapter} holds no {ADAPTER_WEIGHTS}: pickled adapters are never loaded; save it "
            "again with peft's save_pretrained."
        )
    return config


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most of the checkpoint's bytes are stored in.

    Raises:
        ModelError: something that no adapter can be added to, as 8-bit weights.
    """
    sizes: dict[torch.dtype, int] = {}
    for key in checkpoint:
        entry = checkpoint.entry(key)
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    dtype = max(sizes, key=lambda it: sizes[it], default=torch.float32)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(
            f"{checkpoint.name} is stored as {str(dtype).removeprefix('torch.')}: an adapter can "
            "be added to float32, float16 or bfloat16 weights only; pass --no-merge."
        )
    return dtype


def base_of(config: Mapping[str, Any], adapter: Path) -> str:
    """The base model that an adapter's config names.

    Raises:
        UsageError: it names none.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UsageError(f"{adapter / ADAPTER_CONFIG} names no base model: pass --base-model.")
    return named
