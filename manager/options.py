"""Options that several subcommands share, and what they make of them.

Knows click and plain values; imports nothing heavy. A decorator takes its options out of the
command's arguments and hands over one checked value instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from manager.generation import GREEDY, GenerationOptions
from proto.errors import UsageError
from proto.keys import read_keys
from proto.tls import TlsFiles, tls_files

Command = TypeVar("Command", bound=Callable[..., Any])


PIPELINE: Final = "pipeline"
LLAMA_SERVER: Final = "llama-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionConfig:
    """What runs the model, where it is, and how it lets us in."""

    backend: str = PIPELINE  # what follows but `model` belongs to one of them
    workers: str | None = None  # None: the neighbours of 127.0.0.1:7710
    spawn: int | None = None  # start so many here instead
    quantize: str = "none"  # of those that are started here, as is
    kv_quantize: str = "none"
    model: str | None = None  # None: what the workers hold
    secret_file: Path | None = None
    tls: TlsFiles | None = None
    trace: Path | None = None
    event_log: Path | None = None
    recovery_timeout: float = 30.0  # seconds that requests wait when a worker is lost
    # Seconds until the others load its layers, `inf` for never; None: 5, and never with `spawn`.
    takeover_after: float | None = None
    server: str | None = None  # of llama-server, as `parse_server` gives it
    api_key_file: Path | None = None


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


class SecondsOrNever(TextType):
    """Seconds, or the word never, which is infinity."""

    name = "seconds"

    def convert(  # type: ignore[override]
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """What was typed or set; how much makes sense is judged where it is used."""
        if str(value).strip().lower() == "never":
            return math.inf
        try:
            return float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number of seconds nor the word never.", param, ctx)


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
TLS: Final = tuple(
    click.option(
        name, type=click.Path(path_type=Path), metavar="FILE", help=f"Encrypt links: {what}, PEM."
    )
    for name, what in (
        ("--tls-cert", "this machine's certificate"),
        ("--tls-key", "its private key"),
        ("--tls-ca", "the certificate of the authority that signed both sides'"),
    )
)
TLS_NAMES: Final = ("tls_cert", "tls_key", "tls_ca")
MODEL: Final = click.option(
    "--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: what the workers hold."
)
SPAWN: Final = click.option(
    "--spawn", type=int, metavar="N", help="Start N workers here, for this call only."
)


def _quantize_option(help: str) -> Callable[[Command], Command]:
    return click.option(
        "--quantize",
        type=click.Choice(["none", "int8", "int4"]),
        default="none",
        show_default=True,
        help=help,
    )


def _kv_quantize_option(help: str) -> Callable[[Command], Command]:
    return click.option(
        "--kv-quantize",
        type=click.Choice(["none", "int8"]),
        default="none",
        show_default=True,
        help=help,
    )


QUANTIZE: Final = _quantize_option("With --spawn: round the weights to so many bits.")
KV_QUANTIZE: Final = _kv_quantize_option("With --spawn: round keys and values to so many bits.")
TRACE: Final = click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write when each step was where, for chrome://tracing or ui.perfetto.dev.",
)
RECOVERY_TIMEOUT: Final = click.option(
    "--recovery-timeout",
    type=float,
    default=30.0,
    show_default=True,
    metavar="S",
    help="When a worker is lost, wait so many seconds for a spare or for it to come back. "
    "0: fail at once.",
)
TAKEOVER_AFTER: Final = click.option(
    "--takeover-after",
    type=SecondsOrNever(),
    metavar="S",
    help="When a worker is lost, the others load its layers after so many seconds, or never. "
    "Default: 5; never with --spawn, which starts it again.",
)
EVENT_LOG: Final = click.option(
    "--event-log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the scheduler's events, faults included, for `manager replay`.",
)


class WorkersOwn(click.Option):
    """An option whose name stands for something else among the workers' settings."""

    settings_table = "worker"


ADAPTER: Final = click.option(
    "--adapter",
    cls=WorkersOwn,  # COMBOIO_ADAPTER says which ones a worker holds, not which one to use
    metavar="NAME|DIR",
    help="Apply this LoRA adapter: by the name that the workers hold it under, or its folder.",
)
BACKEND: Final = click.option(
    "--backend",
    type=click.Choice([PIPELINE, LLAMA_SERVER]),
    default=PIPELINE,
    show_default=True,
    help="What runs the model: our own workers, or a llama-server that is up already.",
)
SERVER: Final = click.option(
    "--server",
    metavar="URL",
    help="Where that llama-server is, for example http://10.0.0.5:8080; implies its backend.",
)
API_KEY_FILE: Final = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The API key that llama-server asks for. Default: LLAMA_API_KEY.",
)

# The options that have a meaning with one backend only.
OF_BACKEND: Final = {
    PIPELINE: (
        *("workers", "spawn", "quantize", "kv_quantize", "secret_file", *TLS_NAMES, "trace"),
        *("recovery_timeout", "takeover_after", "event_log"),
    ),
    LLAMA_SERVER: ("server", "api_key_file"),
}
OPTIONS: Final = (
    *(BACKEND, WORKERS, SPAWN, QUANTIZE, KV_QUANTIZE, MODEL, SECRET_FILE, *TLS, TRACE),
    *(RECOVERY_TIMEOUT, TAKEOVER_AFTER, EVENT_LOG),
    *(SERVER, API_KEY_FILE),
)


def connection_options(command: Command) -> Command:
    """Add the options of `ConnectionConfig`; the command gets it as `connection`."""

    @wraps(command)
    def with_connection(*args: Any, **values: Any) -> Any:
        backend = _choose_backend(values.pop("backend"))
        own = {
            name: values.pop(name) for name in (*OF_BACKEND[PIPELINE], *OF_BACKEND[LLAMA_SERVER])
        }
        own = {name: value for name, value in own.items() if name in OF_BACKEND[backend]}
        model = values.pop("model")
        if backend == PIPELINE:
            own["tls"] = pop_tls(own)
            settle_spawn_and_workers(own)
            _check_quantize(own)
        else:
            own["server"] = _server_url(own["server"])
            if not is_typed("model"):
                model = None  # a setting names the pipeline's checkpoint
        connection = ConnectionConfig(backend=backend, model=model, **own)
        return command(*args, connection=connection, **values)

    wrapped: Any = with_connection
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def precision_options(command: Command) -> Command:
    """--dtype, --quantize and --kv-quantize of workers that somebody else will start."""
    as_told = "As the workers will be told."
    command = _quantize_option(as_told)(_kv_quantize_option(as_told)(command))
    return click.option("--dtype", default="auto", show_default=True, help=as_told)(command)


def _choose_backend(value: str) -> str:
    """The backend that what was typed speaks of, else the one that is set.

    Raises:
        UsageError: what was typed speaks of both.
    """
    typed = {
        backend: [name for name in names if is_typed(name)] for backend, names in OF_BACKEND.items()
    }
    if is_typed("backend"):
        chosen = value
    elif "server" in typed[LLAMA_SERVER]:
        chosen = LLAMA_SERVER
    else:
        chosen = PIPELINE if typed[PIPELINE] else value
    other = LLAMA_SERVER if chosen == PIPELINE else PIPELINE
    if typed[other]:
        stranger = f"--{typed[other][0].replace('_', '-')}"
        why = f"--backend {chosen}" if is_typed("backend") else "--server"
        if chosen == PIPELINE and not is_typed("backend"):
            raise UsageError(f"{stranger} is for a llama-server: pass --server URL as well.")
        raise UsageError(f"{stranger} means nothing to a {chosen}: leave out {stranger} or {why}.")
    return chosen


def pop_tls(values: dict[str, Any]) -> TlsFiles | None:
    """What the options of `TLS` were given, taken out of `values`.

    Raises:
        UsageError: some were given and some were not.
    """
    return tls_files(*(values.pop(name) for name in TLS_NAMES))


def tls_options(command: Command) -> Command:
    """Add the options of `TLS` as they are."""
    wrapped: Any = command
    for option in reversed(TLS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def key_options(command: Command) -> Command:
    """Add --secret-file and the options of TLS; the command gets both read, as `keys`."""

    @wraps(command)
    def with_keys(*args: Any, **values: Any) -> Any:
        tls = pop_tls(values)
        return command(*args, keys=read_keys(values.pop("secret_file"), tls), **values)

    wrapped: Any = SECRET_FILE(tls_options(with_keys))
    return wrapped  # type: ignore[no-any-return]


def settle_spawn_and_workers(values: dict[str, Any]) -> None:
    """Of two settings, the one that was typed."""
    if values["spawn"] is None or values["workers"] is None:
        return
    if is_typed("spawn") and is_typed("workers"):
        raise UsageError(
            "--spawn starts workers of its own, --workers names others: pass one of them."
        )
    values["workers" if is_typed("spawn") else "spawn"] = None


def _check_quantize(values: dict[str, Any]) -> None:
    """How weights, keys and values are held is said to whoever starts the workers.

    Raises:
        UsageError: it was typed, and no worker is started here.
    """
    for name in ("quantize", "kv_quantize"):
        if values["spawn"] is None and values[name] != "none" and is_typed(name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} {values[name]} is for workers that are started here: pass --spawn N "
                f"as well, or start the workers with {option}."
            )


def _server_url(text: str | None) -> str:
    from manager.llama_server.server_url import EXAMPLE, parse_server

    if text is None:
        raise UsageError(
            f"--backend llama-server needs a server that is up: pass --server {EXAMPLE}, or start "
            "one with `manager llama-server run --keep`."
        )
    return parse_server(text)


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
    "ignore_eos",
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
    click.option(
        "--ignore-eos",
        is_flag=True,
        help="Go on where the model would end: exactly --max-new-tokens, to measure with.",
    ),
)


def is_typed(name: str) -> bool:
    """Whether an option of the command that runs was on its command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE
