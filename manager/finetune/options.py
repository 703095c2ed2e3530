"""Options that the ways of fine-tuning share, and the settings they make of them.

The names of the cluster guides work beside ours (`--model_name`, `--lr`, `--batch_size`); `_` and
`-` are one everywhere. A decorator takes its options out of the command's arguments and hands over
one record of `engine.jobs.settings` instead. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from engine.jobs.settings import (
    DTYPES,
    LOSS_ON,
    QUANTIZE,
    SCHEDULES,
    TEMPLATES,
    TEXT_PER,
    DataSettings,
    JobSettings,
    LoraSettings,
    OutputSettings,
    TrainingSettings,
)
from proto.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

# Fields of the settings whose option has another name; the option's is also the key that stands in
# comboio.toml and in COMBOIO_* variables.
OPTION_OF: Final = {
    "train": "train_path",
    "validation": "val_path",
    "holdout": "validation",
    "r": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "schedule": "lr_schedule",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "eval_batch_size": "per_device_eval_batch_size",
    "log_steps": "logging_steps",
}

LORA: Final = LoraSettings()
TRAINING: Final = TrainingSettings()

if TYPE_CHECKING:
    AmountType = click.ParamType[float | int]
    NamesType = click.ParamType[str]
else:
    AmountType = NamesType = click.ParamType  # generic since click 8.2 only


class HoldoutType(AmountType):
    """A share (`0.1`, `10%`) or a number of samples (`200`)."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | int:
        """A share stays below 1."""
        text = str(value).strip()
        try:
            if text.endswith("%"):
                share = float(text.removesuffix("%")) / 100
                if share < 1:
                    return share
            elif "." in text:
                share = float(text)
                if share < 1:
                    return share
            else:
                return int(text)
        except ValueError:
            pass
        return self.fail(
            f"{text!r} is neither a share like 0.1 or 10% nor a number of samples", param, ctx
        )


class TargetsType(NamesType):
    """Names of modules with commas between them; a list in comboio.toml."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One text with commas."""
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


BASE_MODEL: Final = click.option(
    "--base-model",
    "--model-name",
    "--model",
    "base_model",
    metavar="DIR|HUB_ID",
    help="Checkpoint to fine-tune. Default: the demo model.",
)
SEED: Final = click.option(
    "--seed",
    type=int,
    default=TRAINING.seed,
    show_default=True,
    help="Of the order of the rows, the adapter's start, dropout, and --validation.",
)

DATA: Final = (
    click.option(
        "--train-path",
        "--train-file",
        "--dataset",
        "train_path",
        multiple=True,
        metavar="PATH|HUB_ID",
        help=".txt, .jsonl, .json, .csv, .parquet, a folder of them, a hub name, or hpc-instruct, "
        "evol-instruct, magicoder; may be repeated.",
    ),
    click.option(
        "--val-path",
        "--validation-path",
        "--val-file",
        "val_path",
        multiple=True,
        metavar="PATH|HUB_ID",
        help="Data to validate on; may be repeated.",
    ),
    click.option(
        "--validation",
        type=HoldoutType(),
        metavar="SHARE",
        help="Validate on a part of the training data: 0.1, 10%, or a number of samples.",
    ),
    click.option(
        "--filter-language",
        metavar="NAME",
        help="Only samples whose 'language' is this, as Cuda; not of the --use-... sets.",
    ),
    click.option("--use-evol-instruct", is_flag=True, help="Also train on Evol-Instruct-Code-80k."),
    click.option("--use-magicoder", is_flag=True, help="Also train on Magicoder-OSS-Instruct-75K."),
    click.option("--text-column", metavar="NAME", help="Where running text stands, if not 'text'."),
    click.option("--prompt-column", metavar="NAME", help="Where prompts stand, if not 'prompt'."),
    click.option(
        "--completion-column", metavar="NAME", help="Where answers stand, if not 'completion'."
    ),
    click.option(
        "--text-per",
        type=click.Choice(TEXT_PER),
        default="line",
        show_default=True,
        help="What one text of a .txt file is.",
    ),
    click.option(
        "--template",
        type=click.Choice(TEMPLATES),
        default="auto",
        show_default=True,
        help="How instructions are written: the model's chat template, or '### Instruction:'. "
        "auto: the template if the model has one.",
    ),
    click.option(
        "--loss-on",
        type=click.Choice(LOSS_ON),
        default="answer",
        show_default=True,
        help="What is learnt of data with answers.",
    ),
    click.option(
        "--max-length",
        "--max-seq-length",
        "--block-size",
        "max_length",
        type=int,
        metavar="N",
        help="Tokens of one row; longer texts are cut, longer answers shortened. "
        "Default: 1024, or the model's context.",
    ),
    click.option(
        "--packing/--no-packing",
        default=False,
        help="Put several short samples into one row; they do not see each other.",
    ),
    click.option("--max-samples", type=int, metavar="N", help="Use the first N training samples."),
)

LORA_OPTIONS: Final = (
    click.option("--lora-r", type=int, default=LORA.r, show_default=True, help="Rank."),
    click.option(
        "--lora-alpha",
        type=float,
        default=LORA.alpha,
        show_default=True,
        help="Scale; the adapter counts alpha / r.",
    ),
    click.option("--lora-dropout", type=float, default=LORA.dropout, show_default=True),
    click.option(
        "--target-modules",
        "--lora-target-modules",
        "target_modules",
        type=TargetsType(),
        multiple=True,
        metavar="NAME,...",
        help="Layers to adapt. Default: all linear layers of the decoder.",
    ),
    click.option("--rslora", is_flag=True, help="Rank-stabilised: scale by alpha / sqrt(r)."),
    click.option("--dora", is_flag=True, help="Weight-decomposed (DoRA)."),
)

TRAINING_OPTIONS: Final = (
    click.option(
        "--epochs",
        "--num-train-epochs",
        "epochs",
        type=float,
        default=TRAINING.epochs,
        show_default=True,
    ),
    click.option("--max-steps", type=int, metavar="N", help="Stop after N steps; over --epochs."),
    click.option(
        "--learning-rate",
        "--lr",
        "learning_rate",
        type=float,
        default=TRAINING.learning_rate,
        show_default=True,
    ),
    click.option(
        "--lr-schedule",
        "--lr-scheduler-type",
        "lr_schedule",
        type=click.Choice(SCHEDULES),
        default=TRAINING.schedule,
        show_default=True,
    ),
    click.option(
        "--warmup",
        "--warmup-steps",
        "--warmup-ratio",
        "warmup",
        type=float,
        default=TRAINING.warmup,
        show_default=True,
        help="Below 1 a share of all steps, else steps.",
    ),
    click.option("--weight-decay", type=float, default=TRAINING.weight_decay, show_default=True),
    click.option(
        "--max-grad-norm",
        type=float,
        default=TRAINING.max_grad_norm,
        show_default=True,
        help="Clip the gradient to this norm; 0: never.",
    ),
    click.option(
        "--per-device-train-batch-size",
        "--batch-size",
        "per_device_train_batch_size",
        type=int,
        default=TRAINING.batch_size,
        show_default=True,
        metavar="N",
        help="Rows at once, of one process.",
    ),
    click.option(
        "--gradient-accumulation-steps",
        type=int,
        default=TRAINING.accumulation,
        show_default=True,
        metavar="N",
        help="Batches of one step.",
    ),
    click.option(
        "--per-device-eval-batch-size",
        type=int,
        metavar="N",
        help="Rows at once in validation. Default: as in training.",
    ),
    SEED,
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:K."),
    click.option("--no-cuda", is_flag=True, help="The same as --device cpu."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="Of the base weights. auto: bfloat16 on a GPU that has it, float32 on a CPU.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(QUANTIZE),
        default="none",
        show_default=True,
        help="4bit: QLoRA, with bitsandbytes on a GPU.",
    ),
    click.option(
        "--threads",
        type=int,
        metavar="N",
        help="Of torch on the CPU. 1 is the fastest for tiny models, and beside other programs.",
    ),
    click.option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        default=False,
        help="Less memory, about a third more time.",
    ),
    click.option(
        "--eval-steps",
        type=int,
        metavar="N",
        help="Validate every N steps. Default: after each epoch.",
    ),
    click.option(
        "--eval-at-start/--no-eval-at-start",
        default=True,
        help="Validate before the first step as well.",
    ),
    click.option(
        "--save-steps",
        type=int,
        default=TRAINING.save_steps,
        show_default=True,
        metavar="N",
        help="Write a checkpoint every N steps.",
    ),
    click.option(
        "--keep-checkpoints",
        "--save-total-limit",
        "keep_checkpoints",
        type=int,
        default=TRAINING.keep_checkpoints,
        show_default=True,
        metavar="N",
    ),
    click.option(
        "--logging-steps",
        type=int,
        default=TRAINING.log_steps,
        show_default=True,
        metavar="N",
        help="Write a line every N steps; metrics.jsonl has every step.",
    ),
    click.option(
        "--memory-steps",
        type=int,
        metavar="N",
        help="Write a memory line every N steps. Default: as --logging-steps.",
    ),
)

OUTPUT: Final = (
    click.option(
        "--save-dir",
        "--output-dir",
        "save_dir",
        required=True,
        metavar="DIR",
        help="Where lora_adapters, merged_model, checkpoints, metrics and the report go.",
    ),
    click.option(
        "--merge/--no-merge",
        default=True,
        help="Also save the base model with the adapter added to it.",
    ),
    click.option(
        "--resume", is_flag=True, help="Go on with the run in --save-dir, if there is one."
    ),
    click.option("--overwrite", is_flag=True, help="Remove the earlier run in --save-dir."),
    click.option("--log-file", metavar="FILE", help="Where lines go. Default: train.log there."),
    click.option("--tensorboard/--no-tensorboard", default=True, help="Write TensorBoard's files."),
)


def job_options(method: str) -> Callable[[Command], Command]:
    """Add all options of a fine-tuning job; the command gets them as `settings`."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_settings(*args: Any, **values: Any) -> Any:
            settings = JobSettings(
                method=method,
                base_model=values.pop("base_model"),
                data=take_data(values),
                lora=_take_lora(values),
                training=_take_training(values),
                output=OutputSettings(**_take(values, OutputSettings)),
            )
            return command(*args, settings=settings, **values)

        return _with_options(  # type: ignore[no-any-return]
            with_settings, [BASE_MODEL, *DATA, *LORA_OPTIONS, *TRAINING_OPTIONS, *OUTPUT]
        )

    return decorate


def data_options(command: Command) -> Command:
    """Add the options of the data alone; the command gets them as `data`."""

    @wraps(command)
    def with_data(*args: Any, **values: Any) -> Any:
        data = take_data(values)
        return command(*args, data=data, **values)

    return _with_options(with_data, [BASE_MODEL, *DATA, SEED])  # type: ignore[no-any-return]


def take_data(values: dict[str, Any]) -> DataSettings:
    """The data's settings, out of a command's arguments."""
    return DataSettings(**_take(values, DataSettings))


def _take_lora(values: dict[str, Any]) -> LoraSettings:
    taken = _take(values, LoraSettings)
    names = ",".join(taken["target_modules"]).split(",")
    taken["target_modules"] = tuple(name.strip() for name in names if name.strip())
    return LoraSettings(**taken)


def _take_training(values: dict[str, Any]) -> TrainingSettings:
    if values.pop("no_cuda"):
        if values["device"] not in ("auto", "cpu"):
            raise UsageError(f"--no-cuda and --device {values['device']} contradict: pass one.")
        values["device"] = "cpu"
    return TrainingSettings(**_take(values, TrainingSettings))


def _take(values: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    options = {name: OPTION_OF.get(name, name) for name in kind.__dataclass_fields__}
    return {name: values.pop(option) for name, option in options.items() if option in values}


def _with_options(command: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
