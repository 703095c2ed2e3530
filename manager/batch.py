"""`manager batch`: a file of prompts, many at once, results in input order.

Options become a `BatchConfig`; `run` reads like the command does. What is in the file of prompts
stands in `manager.prompts`, where results go in `manager.results`, how rows run in
`manager.batch_run`, what is measured in `manager.metrics`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import click

from manager import event_loop
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
from manager.batch_run import longest, run_rows
from manager.cli import Interrupted
from manager.generation import GenerationOptions
from manager.metrics import summary
from manager.options import (
    ADAPTER,
    LLAMA_SERVER,
    ConnectionConfig,
    connection_options,
    is_typed,
    sampling_options,
)
from manager.output import Notices
from manager.prompts import PLAIN, Row, Template, read_prompts
from manager.results import Results, open_results
from proto.errors import Error, UsageError

DEFAULT_NEW_TOKENS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """What `manager batch` was asked for."""

    prompts: Path
    options: GenerationOptions
    connection: ConnectionConfig
    batch_size: int = DEFAULT_BATCH_SIZE
    iters: int = 1
    template: Template = PLAIN
    output: Path | None = None  # None: stdout
    overwrite: bool = False
    metrics: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.as_json and self.output is None:
            raise UsageError(
                "--json prints the metrics on stdout, where the results go: "
                "pass --output FILE for these."
            )
        if self.overwrite and self.output is None:
            raise UsageError("--overwrite replaces a file: pass --output FILE as well.")
        _check_paths(
            {
                "--prompts": self.prompts,
                "--output": self.output,
                "--metrics": self.metrics,
                "--trace": self.connection.trace,
                "--event-log": self.connection.event_log,
            }
        )


def _check_paths(paths: dict[str, Path | None]) -> None:
    """What can be said of the files before anything runs."""
    taken: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
            continue  # a device takes any number
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} are the same file, {path}: name two.")
        if option in ("--metrics", "--trace", "--event-log"):
            if path.is_dir():
                raise UsageError(f"{option} {path} is a folder: name a file.")
            if not path.parent.is_dir():
                raise UsageError(f"{option} {path}: there is no folder {path.parent}.")


@click.command()
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help=".txt: a prompt a line; .jsonl: objects with prompt or messages, and options of the row.",
)
@BATCH_SIZE
@ITERS
@OUTPUT
@OVERWRITE
@METRICS
@click.option("--json", "as_json", is_flag=True, help="Print the metrics on stdout.")
@sampling_options
@CHAT
@SYSTEM
@click.option("--base-model", metavar="DIR|HUB_ID", help="The same as --model.")
@ADAPTER
@connection_options
def batch(
    connection: ConnectionConfig,
    base_model: str | None,
    adapter: str | None,
    options: GenerationOptions,
    chat: bool,
    system: str | None,
    **values: Any,
) -> None:
    """Run a file of prompts, many at once, and write one result a line in input order.

    A batch that was interrupted goes on where it ended when the same command is run again;
    without --output results go to stdout.
    Exit code 1 when any row failed; its result says why.
    """
    config = BatchConfig(
        options=replace(options, adapter=adapter),
        connection=_with_model(connection, base_model),
        template=Template(chat=chat, system=system),
        **values,
    )
    rows = read_prompts(config.prompts, config.options, config.template)
    with open_results(config.output, rows, overwrite=config.overwrite) as results:
        try:
            event_loop.run(run(config, rows, results))
        except Interrupted as exc:
            exc.args = (f"interrupted: {results.kept}",)
            raise


async def run(config: BatchConfig, rows: Sequence[Row], results: Results) -> None:
    """Run the rows that are not done, measure, and say how it went.

    Raises:
        Error: in one sentence, which says what is kept; also when any row failed.
    """
    from manager.connection import open_server

    notices = Notices()
    try:
        async with open_server(
            config.connection,
            notices,
            max_sequences=min(config.batch_size, len(rows)),
            max_tokens_hint=lambda encoder: longest(rows, encoder),
            adapters=adapters_of(rows),
        ) as server:
            results.begin({**server.identity, **asdict(config.options), **asdict(config.template)})
            num_kept = len(results.done)
            if num_kept:
                notices.say(f"going on: {num_kept} of {len(rows)} rows are done already")
            if results.num_changed:
                notices.say(f"{results.num_changed} kept rows fit no prompt of the file any more")
            measured = await run_rows(
                server,
                rows,
                results,
                batch_size=config.batch_size,
                iterations=config.iters,
                notices=notices,
            )
    finally:
        notices.clear()
    report = {
        "prompts": str(config.prompts),
        "rows": len(rows),
        "resumed_rows": num_kept,
        "iterations": config.iters,
        "batch_size": config.batch_size,
        "options": asdict(config.options),
        **measured,
    }
    publish(config, report, notices)
    if results.num_failed:
        where = "the results" if config.output is None else config.output
        raise Error(f"{results.num_failed} of {len(rows)} rows failed: {where} has why, row by row")


def adapters_of(rows: Sequence[Row]) -> list[str]:
    """What the rows say of adapters, each once, in their order."""
    return list(dict.fromkeys(row.options.adapter for row in rows if row.options.adapter))


def publish(config: BatchConfig, report: dict[str, Any], notices: Notices) -> None:
    """Say how it went, and write the metrics where they were asked for.

    Raises:
        Error: the metrics cannot be written.
    """
    notices.say(summary(report))
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if config.metrics is not None:
        try:
            config.metrics.write_text(text, encoding="utf-8")
        except OSError as exc:
            raise Error(f"cannot write --metrics {config.metrics}: {exc.strerror}") from exc
    if config.as_json:
        print(text, end="", flush=True)


def _with_model(connection: ConnectionConfig, base_model: str | None) -> ConnectionConfig:
    if base_model is None or (connection.backend == LLAMA_SERVER and not is_typed("base_model")):
        return connection
    if connection.model not in (None, base_model):
        raise UsageError(
            f"--model {connection.model} and --base-model {base_model} name different models: "
            "they mean the same, pass one."
        )
    return replace(connection, model=base_model)


def _set_default(command: click.Command, name: str, default: object) -> None:
    """This command's own default of an option that it shares with others."""
    option = next(it for it in command.params if it.name == name)
    option.default = default


_set_default(batch, "max_new_tokens", DEFAULT_NEW_TOKENS)
