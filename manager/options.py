"""Options that several subcommands share, and what they make of them.

Knows click and plain values; imports nothing heavy. A decorator takes its options out of the
command's arguments and hands over one checked value instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from manager.generation import GREEDY, GenerationOptions
from proto.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """Which workers to use, and how they let us in."""

    workers: str | None = None  # None: the neighbours of 127.0.0.1:7710
    spawn: int | None = None  # start so many here instead
    model: str | None = None  # None: what the workers hold
    secret_file: Path | None = None
    trace: Path | None = None


if TYPE_CHECKING:
    TextType = click.ParamType[str]
else:
    TextType = click.ParamType  # generic since click 8.2 only


class WorkersType(TextType):
    """HOST:PORT,HOST:PORT,...; a list in comboio.toml."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One text with commas; the addresses are read where they are used."""
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


WORKERS: Final = click.option(
    "--workers",
    type=WorkersType(),
    metavar="HOST:PORT,...",
    help="Where the workers are, in any order. Default: the neighbours of 127.0.0.1:7710.",
)
SECRET_FILE: Final = click.option(
    "--secret-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The secret that the workers were started with.",
)
MODEL: Final = click.option(
    "--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: what the workers hold."
)
SPAWN: Final = click.option(
    "--spawn", type=int, metavar="N", help="Start N workers here, for this call only."
)
TRACE: Final = click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write when each step was where, for chrome://tracing or ui.perfetto.dev.",
)


def connection_options(command: Command) -> Command:
    """Add the options of `ConnectionConfig`; the command gets it as `connection`."""

    @wraps(command)
    def with_connection(*args: Any, **values: Any) -> Any:
        spawn, workers = values.pop("spawn"), values.pop("workers")
        if spawn is not None and workers is not None:
            if _is_typed("spawn") and _is_typed("workers"):
                raise UsageError(
                    "--spawn starts workers of its own, --workers names others: pass one of them."
                )
            spawn, workers = (spawn, None) if _is_typed("spawn") else (None, workers)
        connection = ConnectionConfig(
            workers=workers,
            spawn=spawn,
            model=values.pop("model"),
            secret_file=values.pop("secret_file"),
            trace=values.pop("trace"),
        )
        return command(*args, connection=connection, **values)

    wrapped: Any = with_connection
    for option in (TRACE, SECRET_FILE, MODEL, SPAWN, WORKERS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def sampling_options(command: Command) -> Command:
    """Add the options of `GenerationOptions`; the command gets it as `options`."""

    @wraps(command)
    def with_options(*args: Any, **values: Any) -> Any:
        options = GenerationOptions(**{name: values.pop(name) for name in SAMPLING_NAMES})
        return command(*args, options=options, **values)

    wrapped: Any = with_options
    for option in reversed(SAMPLING):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


SAMPLING_NAMES: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "max_new_tokens",
)
SAMPLING: Final = (
    click.option(
        "--max-new-tokens",
        type=int,
        default=GREEDY.max_new_tokens,
        show_default=True,
        metavar="N",
        help="Stop after so many tokens.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=GREEDY.temperature,
        show_default=True,
        help="0 always takes the likeliest token.",
    ),
    click.option("--top-k", type=int, default=0, metavar="K", help="Draw from the K likeliest."),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="Draw from the likeliest that together have probability P.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="Draw from those at least P times as likely as the likeliest.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="Above 1, tokens seen before become less likely.",
    ),
    click.option(
        "--seed", type=int, metavar="S", help="The same seed draws the same text. Default: random."
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
    ),
)


def _is_typed(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE
