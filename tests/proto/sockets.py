"""Listeners, and peers without manners, on real sockets of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from proto.errors import Error
from proto.link import Link, Listener, connect, listen
from proto.messages import Role
from proto.tls import Tls
from tests.proto.wire_examples import WELCOME

T = TypeVar("T")
Play = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def soon(awaitable: Awaitable[T]) -> T:
    """A deadline against a test that hangs, far beyond what is waited for."""
    return await asyncio.wait_for(awaitable, 20)


@asynccontextmanager
async def listening(
    tls: Tls | None = None, **options: Any
) -> AsyncIterator[tuple[Listener, asyncio.Queue[Link], asyncio.Queue[Error]]]:
    """A listener, the links that it let in, and why it refused the others."""
    accepted, refused = asyncio.Queue[Link](), asyncio.Queue[Error]()
    listener = await listen(
        "127.0.0.1:0",
        welcome=lambda hello: WELCOME,
        on_link=accepted.put_nowait,
        on_refused=lambda peer, error: refused.put_nowait(error),
        tls=tls,
        **options,
    )
    try:
        yield listener, accepted, refused
    finally:
        await soon(listener.close())


@asynccontextmanager
async def stranger_at(play: Play) -> AsyncIterator[str]:
    """A server that answers every connection with `play(reader, writer)`; its address."""
    done = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await play(reader, writer)
        await done.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        done.set()
        server.close()
        await asyncio.sleep(0)


async def as_manager(address: str, **options: Any) -> Link:
    """Call a listener as managers do."""
    return await soon(connect(address, role=Role.MANAGER, agent="test", **options))
