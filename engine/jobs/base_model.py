"""Load the model that is fine-tuned, and its tokenizer, where and in the arithmetic that fits.

The checkpoint is found as everywhere in Comboio (`engine.checkpoint`); weights are read from
safetensors only, and no code of a checkpoint is run. Knows no data and no adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from engine.architecture import DTYPES
from engine.checkpoint import SIDE_FILES, Checkpoint
from engine.foreign_code import first_line
from engine.jobs.settings import TrainingSettings
from proto.errors import Error, ModelError, UsageError
from proto.free_memory import free_cpu_bytes

GB: Final = 10**9
# Of the files beside the weights, those that are the model's own, not its tokenizer's.
_MODEL_FILES: Final = {"config.json", "generation_config.json", "model.safetensors.index.json"}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the weights lie, and in what they are computed."""

    device: torch.device
    dtype: torch.dtype  # of the base weights; adapters are float32
    is_4bit: bool = False

    @property
    def dtype_name(self) -> str:
        """As options write it."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        """For forward passes: half precision on a GPU, else whatever the weights are in."""
        if self.device.type == "cuda" and self.dtype is not torch.float32:
            return torch.autocast("cuda", self.dtype)
        return nullcontext()


def choose_placement(settings: TrainingSettings) -> Placement:
    """The GPU if there is one, in bfloat16 if it can; a CPU in float32.

    Raises:
        UsageError: a device, an arithmetic or a quantization that this machine does not have.
    """
    device = _choose_device(settings.device)
    if settings.quantize == "4bit":
        _check_4bit(device)
    if settings.dtype != "auto":
        return Placement(device, DTYPES[settings.dtype], settings.quantize == "4bit")
    if device.type != "cuda":
        return Placement(device, torch.float32)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return Placement(device, dtype, settings.quantize == "4bit")


def _choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as exc:
        raise UsageError(f"--device {wanted!r} is none of auto, cpu, cuda, cuda:K.") from exc
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device {wanted!r} is none of auto, cpu, cuda, cuda:K.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise UsageError(
            f"--device {wanted}: torch {torch.__version__} sees {count} GPUs here; "
            "pass --device cpu (or --no-cuda), or install a torch build for the GPU."
        )
    return torch.device("cuda", index)


def _check_4bit(device: torch.device) -> None:
    from importlib.util import find_spec

    if device.type != "cuda":
        raise UsageError(
            "--quantize 4bit (QLoRA) needs a GPU, and training runs on the CPU here: leave it out, "
            "or run on a node that has one."
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "--quantize 4bit (QLoRA) needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave it out."
        )


def reference(checkpoint: Checkpoint) -> str:
    """What names this model from any folder: its hub id, or its absolute path."""
    if checkpoint.model is not None and checkpoint.name == checkpoint.model:
        folder = Path(checkpoint.model).expanduser()
        if not folder.is_dir():
            return checkpoint.model
    return str(checkpoint.folder.resolve())


def load_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer; None where the checkpoint has none, which still trains on token ids.

    Raises:
        ModelError: its files are damaged.
    """
    from transformers import AutoTokenizer

    folder = checkpoint.tokenizer_folder()
    if folder is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as exc:  # whatever a tokenizer class raises on missing or bad files
        raise ModelError(
            f"the tokenizer of {checkpoint.name} cannot be loaded ({first_line(exc)}): "
            "fetch its files again"
        ) from exc


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files as they are, chat template included: nothing was changed in them."""
    source = checkpoint.tokenizer_folder()
    if source is None:
        return
    for name in SIDE_FILES:
        if name not in _MODEL_FILES and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the data must fit, read from the config alone."""

    vocab_size: int
    max_context: int


def read_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """Without reading a weight.

    Raises:
        ModelError: transformers does not know the model, or the config lacks something.
    """
    config = _read_config(checkpoint)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ModelError(f"config.json of {checkpoint.name} has no usable vocab_size.")
    context = getattr(config, "max_position_embeddings", None)
    return ModelSizes(vocab_size, context if isinstance(context, int) and context > 1 else 2**20)


def load_base(checkpoint: Checkpoint, placement: Placement) -> Any:
    """The whole model with its weights, in training mode off, no gradient asked for.

    Raises:
        ModelError: the weights are missing, incomplete or of a kind that cannot be trained.
        Error: they do not fit in memory; says the numbers.
    """
    from transformers import AutoModelForCausalLM

    _check_memory(checkpoint, placement)
    extra: dict[str, Any] = {}
    if placement.device.type == "cuda":
        extra["device_map"] = {"": placement.device}  # straight there, tensor by tensor
    if placement.is_4bit:
        extra["quantization_config"] = _four_bits(placement.dtype)
    where = reference(checkpoint)
    with quiet_transformers():
        try:
            load: Any = AutoModelForCausalLM.from_pretrained  # annotated to give a model alone
            model, info = load(
                where,
                dtype=placement.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
        except torch.cuda.OutOfMemoryError as exc:
            raise Error(
                f"the weights of {checkpoint.name} do not fit on {placement.device} in "
                f"{placement.dtype_name} ({first_line(exc)}): pass --quantize 4bit, or take a "
                "smaller model."
            ) from exc
        except Exception as exc:  # whatever transformers raises on a checkpoint it cannot take
            raise ModelError(
                f"{checkpoint.name} cannot be loaded ({first_line(exc)}): fetch it again, or take "
                "another model"
            ) from exc
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise ModelError(
            f"{checkpoint.name} lacks {len(missing)} tensors of its own model, {missing[0]} among "
            "them: they would be random; fetch the checkpoint again"
        )
    model.name_or_path = where
    model.requires_grad_(False)
    return model


def _read_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as exc:  # an unknown or damaged config, in transformers' own words
        raise ModelError(
            f"config.json of {checkpoint.name} cannot be used ({first_line(exc)})"
        ) from exc
    return config.get_text_config(decoder=True)


def _four_bits(dtype: torch.dtype) -> Any:
    """NF4 with quantized constants, as QLoRA has it (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_memory(checkpoint: Checkpoint, placement: Placement) -> None:
    """Of a folder on this machine; a hub id's files may not be here yet."""
    if not Path(reference(checkpoint)).is_dir():
        return
    count = sum(_num_elements(checkpoint, key) for key in checkpoint)
    needed = count * (0.55 if placement.is_4bit else placement.dtype.itemsize)
    if placement.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(placement.device)
    else:
        free = free_cpu_bytes()
    if needed <= free:
        return
    knobs = []
    if placement.dtype is torch.float32:
        knobs.append(f"pass --dtype bfloat16 ({count * 2 / GB:.1f} GB)")
    if placement.device.type == "cuda" and not placement.is_4bit:
        knobs.append(f"pass --quantize 4bit ({count * 0.55 / GB:.1f} GB)")
    knobs.append("take a smaller model")
    raise Error(
        f"the weights of {checkpoint.name} take {needed / GB:.1f} GB in {placement.dtype_name}, "
        f"and {free / GB:.1f} GB are free on {placement.device}: {', or '.join(knobs)}."
    )


def _num_elements(checkpoint: Checkpoint, key: str) -> int:
    count = 1
    for size in checkpoint.entry(key).shape:
        count *= size
    return count


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers, and its path.

    Raises:
        ModelError: there is none of the length that the config says.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    # A multimodal model may have as many layers in its other tower.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is not None and decoder is not model:
        own = set(decoder.modules())
        found = [it for it in found if it[1] in own] or found
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers: "
            "which of its layers to adapt is unknown."
        )
    return min(found, key=lambda it: it[0].count("."))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from the library: the command has its own."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging  # without annotations
    verbosity = logging.get_verbosity()
    had_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
