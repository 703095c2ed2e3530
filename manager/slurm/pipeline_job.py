"""What a pipeline job is asked to do: the same options when it is submitted and inside the job.

Checks what can be known before there is a node. Imports no torch: a login node has none to spare.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource

from manager.batch_options import (
    BATCH_SIZE,
    CHAT,
    DEFAULT_BATCH_SIZE,
    ITERS,
    METRICS,
    OUTPUT,
    OVERWRITE,
    SYSTEM,
)
from manager.generation import GenerationOptions
from manager.options import ADAPTER, TRACE, sampling_options
from manager.prompts import Row, Template, read_prompts
from proto.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineJob:
    """The work of a pipeline over the tasks of a job."""

    options: GenerationOptions
    template: Template
    model: str | None = None
    prompts: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    metrics: Path | None = None
    trace: Path | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    iters: int = 1
    prompt: str | None = None
    serve: bool = False
    port: int = 0  # of --serve; 0: a free one
    dtype: str = "auto"
    quantize: str = "none"
    kv_quantize: str = "none"
    device: str = "auto"
    kv_memory: str | None = None
    threads: int | None = None
    stage_to: Path | None = None
    interface: str | None = None
    recovery_timeout_s: float = 60.0
    part: tuple[int, int] | None = None  # (index, count): one task of an array runs these rows

    def __post_init__(self) -> None:
        if [self.prompts is None, self.prompt is None, not self.serve].count(False) != 1:
            raise UsageError(
                "say what the job is for: either --prompts FILE with --output FILE, or "
                "--prompt TEXT, or --serve."
            )
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: a port is a number from 0 to 65535.")
        if self.port and not self.serve:
            raise UsageError("--port belongs to --serve: leave it out.")
        if self.prompts is not None and self.output is None:
            raise UsageError("--prompts needs --output FILE.jsonl: the job's results go there.")
        if self.prompts is None:
            given = {"--output": self.output, "--metrics": self.metrics}
            for name, path in given.items():
                if path is not None:
                    raise UsageError(
                        f"{name} belongs to --prompts: the text of --prompt goes to the job's log."
                    )
            if self.prompt == "":
                raise UsageError("--prompt is empty: write at least one character.")

    def rows(self) -> list[Row]:
        """The prompts of the file, checked; those of this part.

        Raises:
            UsageError: names file and line.
        """
        assert self.prompts is not None
        rows = read_prompts(self.prompts, self.options, self.template)
        if self.part is None:
            return rows
        index, count = self.part
        return rows[index::count]

    def one_of(self, index: int, count: int) -> PipelineJob:
        """The part of one task of an array, which writes files of its own."""

        def own(path: Path | None) -> Path | None:
            return None if path is None else part_path(path, index, count)

        return replace(
            self,
            part=(index, count),
            output=own(self.output),
            metrics=own(self.metrics),
            trace=own(self.trace),
        )

    def check_before_submitting(self) -> None:
        """What would otherwise fail hours later, when the job starts.

        Raises:
            UsageError: in one sentence.
        """
        if self.prompts is not None:
            self.rows()
        for name, path in (("--output", self.output), ("--metrics", self.metrics)):
            if path is None:
                continue
            if path.is_dir():
                raise UsageError(f"{name} {path} is a folder: name a file.")
            if not path.parent.is_dir():
                raise UsageError(f"{name} {path}: there is no folder {path.parent}; make it first.")
            if not os.access(path.parent, os.W_OK):
                raise UsageError(
                    f"{name} {path}: you may not write in {path.parent}; name another folder."
                )
        if self.output is not None and self.output.exists() and not self.overwrite:
            raise UsageError(
                f"--output {self.output} is there already: pass --overwrite to replace it, or "
                "name another file."
            )
        check_model(self.model)

    def worker_words(self) -> list[str]:
        """The options of every worker, beside its section and address."""
        words = ["--dtype", self.dtype, "--quantize", self.quantize, "--device", self.device]
        words += ["--kv-quantize", self.kv_quantize]
        for name in ("model", "kv_memory", "stage_to"):
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return words


def part_path(path: Path, index: int, count: int) -> Path:
    """Where a task of an array writes: "out.jsonl" becomes "out.1-of-3.jsonl"."""
    return path.with_name(f"{path.stem}.{index + 1}-of-{count}{path.suffix}")


def check_model(model: str | None) -> None:
    """A folder must be one with a checkpoint in it; anything else may be a hub id.

    Raises:
        UsageError: it can be neither.
    """
    if model is None:
        return
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"--model {model} has no config.json: name the folder of a Hugging Face checkpoint."
            )
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UsageError(
            f"--model {model}: there is no such folder; name the folder of a Hugging Face "
            "checkpoint that all nodes see, or a hub id as in org/name."
        )


WORK_OPTIONS: Final = (
    click.option("--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: the demo model."),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Run these, as `manager batch` does; needs --output.",
    ),
    OUTPUT,
    OVERWRITE,
    METRICS,
    TRACE,
    BATCH_SIZE,
    ITERS,
    click.option("--prompt", metavar="TEXT", help="Or continue this one; it goes to the log."),
    click.option(
        "--serve", is_flag=True, help="Or serve the API and the page until the job is cancelled."
    ),
    click.option(
        "--port", type=int, default=0, metavar="N", help="Of --serve. Default: a free one."
    ),
    CHAT,
    SYSTEM,
    click.option("--dtype", default="auto", metavar="NAME", help="As `worker --dtype`."),
    click.option("--quantize", default="none", metavar="NAME", help="As `worker --quantize`."),
    click.option(
        "--kv-quantize", default="none", metavar="NAME", help="As `worker --kv-quantize`."
    ),
    click.option(
        "--device",
        default="auto",
        metavar="NAME",
        help="As `worker --device`; each task of a node takes its own GPU.",
    ),
    click.option("--kv-memory", metavar="SIZE", help="As `worker --kv-memory`."),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads a worker."
    ),
    click.option(
        "--stage-to",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Copy each worker's slice to this folder of its node first.",
    ),
    click.option("--interface", metavar="NAME", help="Network between the nodes, as ib0."),
    click.option(
        "--recovery-timeout",
        "recovery_timeout_s",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for a worker that went away to come back.",
    ),
)


NOT_OPTIONS: Final = ("options", "template", "part")


def pipeline_job_options(command: Command) -> Command:
    """Add the options of `PipelineJob`; the command gets it as `job`."""
    names = [name for name in PipelineJob.__slots__ if name not in NOT_OPTIONS]

    @wraps(command)
    def with_job(*args: Any, options: GenerationOptions, **values: Any) -> Any:
        template = Template(chat=values.pop("chat"), system=values.pop("system"))
        options = replace(options, adapter=values.pop("adapter"))
        own = {name: values.pop(name) for name in names}
        job = PipelineJob(options=options, template=template, **own)
        return command(*args, job=job, **values)

    wrapped: Any = sampling_options(ADAPTER(with_job))
    for option in reversed(WORK_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def words_of(ctx: click.Context, names: Iterable[str]) -> list[str]:
    """The options that were set, of those named, as words of a command line.

    Files become absolute: a job may begin in another folder than it was submitted from.
    """
    wanted, words = set(names), list[str]()
    for parameter in ctx.command.params:
        name = parameter.name or ""
        if name not in wanted or ctx.get_parameter_source(name) in (ParameterSource.DEFAULT, None):
            continue
        value = ctx.params[name]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words += (parameter.opts if value else parameter.secondary_opts)[:1]
            continue
        for one in value if isinstance(value, (tuple, list)) else (value,):
            text = str(one.absolute()) if isinstance(one, Path) else str(one)
            # One word, so that a value that begins with a dash is no option.
            words.append(f"{parameter.opts[0]}={text}")
    return words
