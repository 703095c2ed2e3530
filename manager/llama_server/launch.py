"""Start llama-server over its rpc-servers, know when it is ready and when it is lost, end it.

Whoever runs it says where the rpc-servers are: `rpc_servers_here` starts some on this machine, a
job has one on each node. When one of them goes, llama-server goes with it (it aborts); then all is
started once more and the work goes on.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeVar

from manager.llama_server.binaries import ServerProgram, ending
from manager.llama_server.command_line import ServerSettings, server_words
from manager.llama_server.health import Health, ask_health
from manager.llama_server.ports import check_free, listens
from manager.llama_server.processes import ChildProcess, LineSink
from manager.llama_server.rpc_servers import NO_RPC_SERVERS, RpcServers
from proto.errors import Error, UsageError

T = TypeVar("T")

POLL_S: Final = 0.05
MAX_POLL_S: Final = 0.5
# A request fails before the process that served it has ended, and llama-server ends before the
# rpc-server that it lost: so long we wait for the cause, to name it.
CAUSE_WITHIN_S: Final = 2.0

OnState = Callable[[Health, float], None]  # state, seconds since the start

# What llama-server says before it leaves -> what to tell, with what it said after the colon.
SENTENCES: Final = (
    (re.compile(r"couldn't bind HTTP server socket"), "its port is taken: set another port_server"),
    (re.compile(r"error: invalid argument: (.+)"), "it does not know this word of server_args"),
    (
        re.compile(r"(?:unable|failed) to allocate|out of memory|cannot allocate"),
        "there is not enough memory: use more nodes, a smaller quantization, or less context",
    ),
    (re.compile(r"error loading model: (.+)"), "it cannot load the model"),
    (re.compile(r"unknown model architecture"), "its version does not know this kind of model"),
)
_STAMP: Final = re.compile(r"^[\d.]+ [A-Z] +(?:\w+ +\w+: )?")  # time and level before a log line


class ProcessLost(Error):
    """llama-server or one of its rpc-servers ended while it was needed."""


class RunningServer:
    """A llama-server that was ready."""

    def __init__(self, process: ChildProcess, url: str, rpc_servers: RpcServers) -> None:
        self.url: Final = url
        self._process, self._rpc_servers = process, rpc_servers

    @property
    def pid(self) -> int:
        """Of llama-server."""
        return self._process.pid

    async def watch(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work, unless the server is lost before it is done.

        Raises:
            ProcessLost: a process ended; the work was cancelled, or had failed for it.
            Whatever the work raises, while the server stands.
        """
        working, losing = asyncio.ensure_future(work), asyncio.ensure_future(self.lost())
        try:
            await asyncio.wait({working, losing}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                failure = working.exception()
                if failure is None:
                    return working.result()
                if isinstance(failure, Error) and not isinstance(failure, UsageError):
                    # Was it the server's end that made it fail?
                    await asyncio.wait({losing}, timeout=CAUSE_WITHIN_S)
            if losing.done():
                raise ProcessLost(losing.result())
            return working.result()
        finally:
            for task in (working, losing):
                task.cancel()
            await asyncio.gather(working, losing, return_exceptions=True)

    async def lost(self) -> str:
        """Wait until a process ends; a sentence without its full stop says which and how."""
        return await _loss(self._process, self._rpc_servers)


@asynccontextmanager
async def llama_server(
    program: ServerProgram,
    settings: ServerSettings,
    rpc_servers: RpcServers = NO_RPC_SERVERS,
    *,
    load_timeout_s: float,
    on_state: OnState,
    on_line: LineSink,
    environ: Mapping[str, str] = os.environ,
) -> AsyncIterator[RunningServer]:
    """Run llama-server, ready when the block begins, ended after it.

    Args:
        rpc_servers: ready, and used by nobody else. They must outlive the block.
        on_state: told what it is doing, several times a second, until it is ready.
        on_line: told each line that it logs.
    Raises:
        UsageError: its port is taken, or its version cannot do what was asked.
        ProcessLost: a process ended that may well live the next time.
        Error: it cannot load the model, or not in time.
    """
    words = server_words(program, settings, rpc_servers.addresses)
    check_free(settings.host, settings.port, key="port_server")
    process = ChildProcess("llama-server", words, program.environment(environ), on_line)
    try:
        await process.start()
        await _until_ready(process, settings, rpc_servers, load_timeout_s, on_state)
        yield RunningServer(process, f"http://{settings.host}:{settings.port}", rpc_servers)
    finally:
        await process.stop()


async def with_one_restart(
    start: Callable[[], AbstractAsyncContextManager[RunningServer]],
    work: Callable[[RunningServer], Coroutine[Any, Any, T]],
    on_restart: Callable[[str], None],
) -> T:
    """Start everything and do the work; if a process is lost, all of it once more.

    Args:
        work: called again after a loss: it must leave out what it has done already.
        on_restart: told why.
    Raises:
        Error: a process was lost the second time too, or the work failed.
    """
    try:
        async with start() as server:
            return await server.watch(work(server))
    except ProcessLost as exc:
        on_restart(str(exc))
    try:
        async with start() as server:
            return await server.watch(work(server))
    except ProcessLost as exc:
        raise Error(f"{exc} (it happened twice, after everything had been started again)") from exc


async def _until_ready(
    process: ChildProcess,
    settings: ServerSettings,
    rpc_servers: RpcServers,
    timeout_s: float,
    on_state: OnState,
) -> None:
    """Poll /health, and watch every process meanwhile."""
    polling = asyncio.ensure_future(_poll(process, settings, on_state))
    ended, losing = (
        asyncio.ensure_future(process.wait()),
        asyncio.ensure_future(rpc_servers.lost()),
    )
    tasks: set[asyncio.Future[Any]] = {polling, ended, losing}
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if losing.done() or (ended.done() and ended.result() < 0 and rpc_servers.addresses):
            raise ProcessLost(await _loss(process, rpc_servers))
        if ended.done():
            raise _start_failure(process)
        if not polling.done():
            raise Error(
                f"llama-server was not ready within {timeout_s:g} seconds: "
                "raise load_timeout_s if it only needs longer"
                f"{_last_words(process)}"
            )
        await polling
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _poll(process: ChildProcess, settings: ServerSettings, on_state: OnState) -> None:
    start_s, pause_s = time.monotonic(), POLL_S
    while True:
        health = await ask_health(settings.host, settings.port)
        if health is Health.READY and not listens(process.pid, settings.port):
            health = Health.UNREACHABLE  # somebody else's server, that took the port before ours
        on_state(health, time.monotonic() - start_s)
        if health is Health.READY:
            return
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.2, MAX_POLL_S)


async def _loss(process: ChildProcess, rpc_servers: RpcServers) -> str:
    """Wait for an end; of llama-server's and an rpc-server's, the latter is the cause."""
    ended = asyncio.ensure_future(process.wait())
    losing = asyncio.ensure_future(rpc_servers.lost())
    try:
        await asyncio.wait({ended, losing}, return_when=asyncio.FIRST_COMPLETED)
        if not losing.done() and rpc_servers.addresses:
            await asyncio.wait({losing}, timeout=CAUSE_WITHIN_S / 2)
        if losing.done():
            return losing.result()
        return f"{process.name} {ending(ended.result())}{_last_words(process)}"
    finally:
        for task in (ended, losing):
            task.cancel()
        await asyncio.gather(ended, losing, return_exceptions=True)


def _start_failure(process: ChildProcess) -> Error:
    """Why llama-server left before it was ready, in one sentence."""
    assert process.exit_code is not None
    for pattern, sentence in SENTENCES:
        for line in process.lines:
            if match := pattern.search(line):
                said = match[1] if match.groups() else _STAMP.sub("", line.strip())
                return Error(f"llama-server did not start: {sentence} ({said})")
    return Error(f"llama-server {ending(process.exit_code)} at its start{_last_words(process)}")


def _last_words(process: ChildProcess) -> str:
    line = _STAMP.sub("", process.last_line)
    return f"; the last it said: {line}" if line else ""
