"""`manager serve`: its options. What it does stands in `manager.serve.server`, loaded later."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

import click

from manager import event_loop
from manager.options import (
    MODEL,
    SECRET_FILE,
    SPAWN,
    WORKERS,
    ConnectionConfig,
    WorkersOwn,
    settle_spawn_and_workers,
    tls_options,
)
from manager.serve.config import (
    MAX_BODY_BYTES,
    STREAM_EVENTS,
    Limits,
    ServeConfig,
    named_adapters,
)
from proto.errors import UsageError
from proto.tls import tls_files

NEEDED: Final = ("starlette", "uvicorn", "prometheus_client", "llguidance")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 picks a free one.")
@WORKERS
@SPAWN
@MODEL
@SECRET_FILE
@tls_options
@click.option(
    "--adapter",
    "adapters",
    cls=WorkersOwn,
    multiple=True,
    metavar="NAME|DIR|NAME=DIR",
    help="Serve this LoRA adapter as well, as a model of its own; may be repeated.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Clients must send one of its lines as their API key; mode 0600.",
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without an API key.")
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="URL",
    help="Let pages from there call the API; may be repeated. Default: none.",
)
@click.option(
    "--max-concurrent",
    type=int,
    default=64,
    show_default=True,
    metavar="N",
    help="Most texts that are generated at the same time.",
)
@click.option(
    "--max-queue",
    type=int,
    default=256,
    show_default=True,
    metavar="N",
    help="Most that wait behind them; then clients are told to come back later.",
)
@click.option(
    "--request-timeout",
    "request_timeout_s",
    type=float,
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="End a request that takes longer, its waiting included.",
)
@click.option(
    "--drain-timeout",
    "drain_timeout_s",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="After a signal, how long what runs may go on.",
)
@click.option(
    "--max-body",
    default=MAX_BODY_BYTES,
    show_default=True,
    metavar="SIZE",
    help="Largest request.",
)
@click.option(
    "--stream-events",
    type=int,
    default=STREAM_EVENTS,
    show_default=True,
    metavar="N",
    help="Most events a second over all streams; tokens that come faster share one. 0: none do.",
)
@click.option(
    "--trace-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a trace of every request there, for ui.perfetto.dev.",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True
)
def serve(
    workers: str | None,
    spawn: int | None,
    model: str | None,
    secret_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    adapters: tuple[str, ...],
    max_concurrent: int,
    max_queue: int,
    request_timeout_s: float,
    drain_timeout_s: float,
    max_body: str,
    **values: object,
) -> None:
    """Serve an OpenAI-compatible API, and a page to chat and to watch the workers.

    Prints a line that begins with `ready` on stdout once a token went through every worker. Ends
    with a signal: what runs is finished, new requests are turned away.
    """
    check_installed("manager serve")
    where: dict[str, object] = {"workers": workers, "spawn": spawn}
    settle_spawn_and_workers(where)
    config = ServeConfig(
        connection=ConnectionConfig(
            **where,  # type: ignore[arg-type]
            model=model,
            secret_file=secret_file,
            tls=tls_files(tls_cert, tls_key, tls_ca),
        ),
        adapters=named_adapters(adapters),
        limits=Limits(
            max_concurrent=max_concurrent,
            max_queue=max_queue,
            request_timeout_s=request_timeout_s,
            drain_timeout_s=drain_timeout_s,
            max_body=max_body,
        ),
        **values,  # type: ignore[arg-type]
    )
    from manager.serve.server import run

    event_loop.run(run(config))


def check_installed(command: str) -> None:
    """Raises UsageError unless the extra [serve] is there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{command} needs {', '.join(missing)}, not installed here: run "
            "`pip install 'comboio[serve]'`."
        )
