"""rpc-servers: each lends this machine's CPU or GPU to one llama-server, over TCP.

There is neither password nor encryption on that port: bind it to loopback or to the private
address of a cluster's node, never to an open network. One rpc-server serves one llama-server, and
is not used again for the next.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol

from manager.llama_server.binaries import Program, ending
from manager.llama_server.ports import check_free, free_port, listens
from manager.llama_server.processes import ChildProcess, LineSink
from proto.errors import Error, UsageError

START_TIMEOUT_S: Final = 120.0  # a GPU may take a while to wake
POLL_S: Final = 0.02
CONNECT_TIMEOUT_S: Final = 5.0
RESERVED: Final = {
    **dict.fromkeys(("-H", "--host"), "it listens where its llama-server reaches it"),
    **dict.fromkeys(("-p", "--port"), "port_rpc sets it"),
    **dict.fromkeys(("-t", "--threads"), "threads sets it"),
}


class RpcServers(Protocol):
    """The rpc-servers of one llama-server, whoever started them."""

    @property
    def addresses(self) -> Sequence[str]:
        """HOST:PORT of each, in the order of the layers."""

    async def lost(self) -> str:
        """Wait until one of them is lost; a sentence without its full stop says which and why."""


@dataclass(frozen=True, slots=True)
class RemoteRpcServers:
    """rpc-servers that somebody else started and watches; with no address, none."""

    addresses: Sequence[str] = ()
    wait_for_loss: Callable[[], Awaitable[str]] | None = field(default=None, repr=False)

    async def lost(self) -> str:
        """What whoever watches them says; without anybody, nothing for ever."""
        if self.wait_for_loss is None:
            return await _never()
        return await self.wait_for_loss()


NO_RPC_SERVERS: Final = RemoteRpcServers()


class RpcServer:
    """One rpc-server of this machine."""

    def __init__(
        self,
        program: Program,
        *,
        name: str,
        host: str,
        port: int,
        threads: int | None,
        more_words: Sequence[str],
        on_line: LineSink,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Nothing is started yet.

        Args:
            host: an IPv4 address in numbers: rpc-server knows no names.
        Raises:
            UsageError: `more_words` has what is set here.
        """
        for word in more_words:
            if (why := RESERVED.get(word.partition("=")[0])) is not None:
                raise UsageError(f"rpc_args has {word}: {why}; take it out.")
        self.host, self.port = host, port
        words = [str(program.path), "-H", host, "-p", str(port)]
        if threads is not None and "-t" in program.flags:
            words += ["-t", str(threads)]
        self.process: Final = ChildProcess(
            name, [*words, *more_words], program.environment(environ), on_line
        )

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.host}:{self.port}"

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it, and wait until it takes connections.

        Raises:
            UsageError: its port is taken.
            Error: it ended, or takes none in time.
        """
        check_free(self.host, self.port, key="port_rpc")
        await self.process.start()
        ready = asyncio.ensure_future(self._is_listening())
        ended = asyncio.ensure_future(self.process.wait())
        try:
            await asyncio.wait(
                {ready, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done():  # its exit code says nothing: 0 as well when it could not listen
                raise Error(self.loss())
            if not ready.done():
                raise Error(
                    f"{self.process.name} at {self.address} took no connection within "
                    f"{timeout_s:g} seconds{self._last_words()}"
                )
            await ready
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)

    async def _is_listening(self) -> None:
        """It prints its banner before it listens: only a connection proves that it does."""
        while True:
            if listens(self.process.pid, self.port):
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        _, writer = await asyncio.open_connection(self.host, self.port)
                    writer.close()
                    await writer.wait_closed()
                    return
                except (OSError, asyncio.TimeoutError):
                    pass
            await asyncio.sleep(POLL_S)

    def loss(self) -> str:
        """How it ended, as a sentence without its full stop."""
        code = self.process.exit_code
        how = "ended" if code is None else ending(code)
        return f"{self.process.name} at {self.address} {how}{self._last_words()}"

    def _last_words(self) -> str:
        line = self.process.last_line
        return f"; the last it said: {line}" if line else ""


class RpcServersHere:
    """Several rpc-servers of this machine."""

    def __init__(self, servers: Sequence[RpcServer]) -> None:
        self._servers = servers

    @property
    def addresses(self) -> Sequence[str]:
        return [server.address for server in self._servers]

    @property
    def pids(self) -> Sequence[int]:
        """Their processes."""
        return [server.process.pid for server in self._servers]

    async def lost(self) -> str:
        if not self._servers:
            return await _never()
        ends = {asyncio.ensure_future(it.process.wait()): it for it in self._servers}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return ends[done.pop()].loss()
        finally:
            for end in ends:
                end.cancel()
            await asyncio.gather(*ends, return_exceptions=True)


@asynccontextmanager
async def rpc_servers_here(
    program: Program | None,
    count: int,
    *,
    host: str = "127.0.0.1",
    first_port: int | None = None,
    threads: int | None = None,
    more_words: Sequence[str] = (),
    on_line: LineSink,
) -> AsyncIterator[RpcServersHere]:
    """Start `count` of them, ready when the block begins, ended after it.

    Args:
        program: None where `count` is 0.
        first_port: of the first, the others follow; None: free ones.
    Raises:
        UsageError: a port is taken.
        Error: one of them could not be started.
    """
    servers: list[RpcServer] = []
    async with AsyncExitStack() as stack:
        for index in range(count):
            assert program is not None
            server = RpcServer(
                program,
                name=f"rpc-server {index + 1}",
                host=host,
                port=free_port(host) if first_port is None else first_port + index,
                threads=threads,
                more_words=more_words,
                on_line=on_line,
            )
            stack.push_async_callback(server.process.stop)
            await server.start()
            servers.append(server)
        yield RpcServersHere(servers)


async def _never() -> str:
    """What cannot be lost."""
    waiting: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    return await waiting
