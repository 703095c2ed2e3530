"""The server's life: a socket, a pipeline behind it, requests until a signal, then what is left.

The socket answers from the start, so that /health can say why nothing runs yet. Owns uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import uvicorn

from manager.serve.app import Api
from manager.serve.config import ServeConfig
from manager.serve.keeper import Connect, Keeper
from manager.serve.log import Log
from manager.serve.traces import RequestTraces
from proto.errors import UsageError
from proto.quick_start import settle

BACKLOG: Final = 1024
# Between the end of what runs and the end of the process: connections that nobody closes.
GOODBYE_S: Final = 2


class Uvicorn(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None are its own."""
        yield


async def run(
    config: ServeConfig,
    *,
    connect: Connect | None = None,
    on_ready: Callable[[str, str], None] = lambda url, model: None,
) -> None:
    """Serve until a signal, or until cancelled; then finish what runs.

    Args:
        connect: says where the workers are, each time that the pipeline is opened.
        on_ready: told the address and the model's name, once.
    Raises:
        Error: there is no pipeline, or no socket, in one sentence.
    """
    api_keys = config.api_keys()
    log = Log(config.log_format)
    traces = None if config.trace_dir is None else RequestTraces(config.trace_dir, log)
    keeper = Keeper(config, log, traces, connect)
    api = Api(config, keeper, log, traces)
    with listening(config) as listener:
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log("listening", url=url)
        async with _serving(api, api_keys, listener, config):
            keeping = asyncio.ensure_future(keeper.run())
            try:
                await _until_open(keeper, keeping)
                settle()
                pipeline = keeper.pipeline
                name = pipeline.model_name if pipeline is not None else ""
                print(f"ready {url} model {name}", flush=True)
                on_ready(url, name)
                # A signal cancels this task, and not yet what it waits for.
                await asyncio.shield(keeping)
            except asyncio.CancelledError:
                await _drain(api, keeper, config, log)
            finally:
                keeper.drain()
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)


async def _until_open(keeper: Keeper, keeping: asyncio.Future[None]) -> None:
    """The pipeline stands.

    Raises:
        Error: it cannot be opened.
    """
    opened = asyncio.ensure_future(keeper.opened.wait())
    waits: set[asyncio.Future[Any]] = {opened, keeping}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            await keeping
    finally:
        opened.cancel()


async def _drain(api: Api, keeper: Keeper, config: ServeConfig, log: Log) -> None:
    """Turn new requests away, and wait for those that run."""
    keeper.drain()
    log("draining", running=api.admission.running, waiting=api.admission.waiting)
    deadline_s = asyncio.get_running_loop().time() + config.limits.drain_timeout_s
    while api.admission.running + api.admission.waiting:
        if asyncio.get_running_loop().time() > deadline_s:
            log("not waiting any longer", running=api.admission.running)
            break
        await asyncio.sleep(0.05)
    log("done")


@asynccontextmanager
async def _serving(
    api: Api, api_keys: tuple[str, ...], listener: socket.socket, config: ServeConfig
) -> AsyncIterator[None]:
    """Requests are answered in this block."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logging.getLogger(name).disabled = True  # what is to be said, our own log says
    server = Uvicorn(
        uvicorn.Config(
            api.app(api_keys),
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            http="httptools",
            ws="none",
            timeout_graceful_shutdown=GOODBYE_S,
            backlog=BACKLOG,
        )
    )
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        api.closing.set()
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """The socket, bound.

    Raises:
        UsageError: there is no such address here, or somebody else listens there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        raise UsageError(f"--host {config.host}: this machine has no such address.") from exc
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as exc:
            why = (exc.strerror or str(exc)).lower()
            raise UsageError(
                f"cannot listen on {config.host}:{config.port}: {why}; pass another --port, or 0 "
                "for a free one."
            ) from exc
        yield listener
