"""What a fine-tuning job was asked for: the same record for LoRA, SFT and AxoNN.

Pure: plain values, checked when they are made. Options of a command line become these, they
travel as JSON to processes that a launcher starts, and a run is resumed only where those that
change its result are the same. Knows no data, no model and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, get_type_hints

from proto.errors import UsageError

TEMPLATES: Final = ("auto", "chat", "plain")
TEXT_PER: Final = ("line", "file")
LOSS_ON: Final = ("answer", "all")
SCHEDULES: Final = ("linear", "cosine", "constant")
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
QUANTIZE: Final = ("none", "4bit")

# Settings that change how a run is watched or where and in what parts it computes, not what. The
# rows of a step, of all its parts together, are compared apart.
FREE_ON_RESUME: Final = frozenset(
    {"device", "batch_size", "accumulation", "gradient_checkpointing", "eval_batch_size"}
    | {"eval_steps", "eval_at_start", "save_steps", "keep_checkpoints", "log_steps"}
    | {"memory_steps", "threads"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where the data is, how it is read, and how it becomes rows of tokens."""

    train: tuple[str, ...] = ()  # files, folders, hub names
    validation: tuple[str, ...] = ()
    holdout: float | int | None = None  # share (below 1) or number of training samples kept apart
    filter_language: str | None = None
    use_evol_instruct: bool = False
    use_magicoder: bool = False
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    text_per: str = "line"  # of a .txt file
    template: str = "auto"  # how instructions and conversations are written
    loss_on: str = "answer"  # of data that has answers
    max_length: int | None = (
        None  # tokens of one row; None: 1024, or the model's context if shorter
    )
    packing: bool = False
    max_samples: int | None = None  # of the training data

    def __post_init__(self) -> None:
        _check_one_of("--template", self.template, TEMPLATES)
        _check_one_of("--text-per", self.text_per, TEXT_PER)
        _check_one_of("--loss-on", self.loss_on, LOSS_ON)
        _check_at_least("--max-length", self.max_length, 2)
        _check_at_least("--max-samples", self.max_samples, 1)
        if self.holdout is not None and self.holdout <= 0:
            raise UsageError(
                f"--validation {self.holdout} holds nothing out: write a share like 0.1 or 10%, "
                "or a number of samples."
            )
        if self.holdout is not None and self.validation:
            raise UsageError(
                "--validation holds out a part of the training data, --val-path names other data: "
                "pass one of them."
            )
        if (self.prompt_column is None) != (self.completion_column is None):
            raise UsageError("--prompt-column and --completion-column belong together: pass both.")
        if self.text_column is not None and self.prompt_column is not None:
            raise UsageError("pass either --text-column, or --prompt-column and its completion.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapter: LoRA (arXiv:2106.09685), rank-stabilised or weight-decomposed if asked."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ()  # empty: all linear layers of the decoder
    rslora: bool = False  # scale by alpha / sqrt(r), arXiv:2312.03732
    dora: bool = False  # arXiv:2402.09353

    def __post_init__(self) -> None:
        _check_at_least("--lora-r", self.r, 1)
        if self.alpha <= 0:
            raise UsageError(f"--lora-alpha {self.alpha:g} must be above 0.")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--lora-dropout {self.dropout:g} must be from 0 up to 1, without 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How long, how fast, with what batches; where it computes, and how often it is looked at."""

    epochs: float = 3.0
    max_steps: int | None = None  # wins over epochs
    learning_rate: float = 2e-4
    schedule: str = "linear"
    warmup: float = 0.03  # below 1 a share of all steps, else steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: never clipped
    batch_size: int = 4  # rows of one micro-batch of one process
    accumulation: int = 1  # micro-batches of one step
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    gradient_checkpointing: bool = False
    eval_batch_size: int | None = None  # None: as batch_size
    eval_steps: int | None = None  # None: at the end of each epoch
    eval_at_start: bool = True
    save_steps: int = 100
    keep_checkpoints: int = 2
    log_steps: int = 10
    memory_steps: int | None = None  # None: as log_steps
    threads: int | None = None  # of torch on the CPU; None: as many as torch takes

    def __post_init__(self) -> None:
        _check_one_of("--lr-schedule", self.schedule, SCHEDULES)
        _check_one_of("--dtype", self.dtype, DTYPES)
        _check_one_of("--quantize", self.quantize, QUANTIZE)
        for name, value in (
            ("--max-steps", self.max_steps),
            ("--per-device-train-batch-size", self.batch_size),
            ("--gradient-accumulation-steps", self.accumulation),
            ("--per-device-eval-batch-size", self.eval_batch_size),
            ("--eval-steps", self.eval_steps),
            ("--save-steps", self.save_steps),
            ("--keep-checkpoints", self.keep_checkpoints),
            ("--logging-steps", self.log_steps),
            ("--memory-steps", self.memory_steps),
            ("--threads", self.threads),
        ):
            _check_at_least(name, value, 1)
        if self.epochs <= 0:
            raise UsageError(f"--epochs {self.epochs:g} must be above 0.")
        if self.learning_rate <= 0:
            raise UsageError(f"--learning-rate {self.learning_rate:g} must be above 0.")
        for name, rate in (
            ("--warmup", self.warmup),
            ("--weight-decay", self.weight_decay),
            ("--max-grad-norm", self.max_grad_norm),
        ):
            if rate < 0:
                raise UsageError(f"{name} {rate:g} must not be below 0.")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed} must be from 0 up to {2**32 - 1}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSettings:
    """Where results go, and what happens to what is there already."""

    save_dir: str
    merge: bool = True
    resume: bool = False
    overwrite: bool = False
    log_file: str | None = None  # None: train.log in save_dir
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError(
                "--resume goes on with what is in --save-dir, --overwrite removes it: "
                "pass one of them."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """All of it. `method` is "lora", "sft" or "axonn"."""

    method: str
    base_model: str | None = None  # folder or hub id; None: the demo model
    data: DataSettings = field(default_factory=DataSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: OutputSettings

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` makes the same settings of them."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> JobSettings:
        """The settings that `to_json` wrote, for a process that a launcher started.

        Raises:
            UsageError: a field is missing or unknown; both ends must be the same release.
        """
        parts = {
            "data": DataSettings,
            "lora": LoraSettings,
            "training": TrainingSettings,
            "output": OutputSettings,
        }
        try:
            made = {name: _restore(kind, said[name]) for name, kind in parts.items()}
            return cls(method=said["method"], base_model=said["base_model"], **made)
        except (KeyError, TypeError) as exc:
            raise UsageError(
                f"the settings of this job were written by another release of comboio ({exc})."
            ) from exc


def what_counts(settings: JobSettings) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it goes on with.

    Data and model are left out: they are compared by what they hold, not by their path.
    """
    training = asdict(settings.training)
    return {
        "method": settings.method,
        **{f"lora.{name}": value for name, value in asdict(settings.lora).items()},
        **{
            f"training.{name}": value
            for name, value in training.items()
            if name not in FREE_ON_RESUME
        },
    }


def _restore(kind: type[Any], said: Mapping[str, Any]) -> Any:
    """JSON has no tuples."""
    hints = get_type_hints(kind)
    values = {
        name: tuple(value) if str(hints[name]).startswith("tuple") else value
        for name, value in said.items()
    }
    return kind(**values)


def _check_one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value!r} is none of {', '.join(known)}.")


def _check_at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{option} {value} must be {least} or more.")
