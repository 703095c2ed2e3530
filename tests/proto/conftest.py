"""Links on both event loops, over TCP and in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import NamedTuple

import pytest

from proto.link import Link, LinkSettings, connect, listen
from proto.messages import PROTOCOL_VERSION, Hello, Role
from proto.session import LISTENER, OPENER, Session
from proto.tls import Tls
from tests.proto import memory_transport
from tests.proto.wire_examples import WELCOME
from tests.support.certificates import tls_of_here


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every async test here runs on asyncio's own loop, and on uvloop where there is one."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
        "asyncio": asyncio.new_event_loop
    }
    try:
        import uvloop
    except ImportError:
        return factories
    return {**factories, "uvloop": uvloop.new_event_loop}


class LinkPair(NamedTuple):
    """Both ends of one open link."""

    opener: Link
    listener: Link


MakePair = Callable[..., Awaitable[LinkPair]]


@pytest.fixture(params=["memory", "tcp", "tls"])
async def link_pair(request: pytest.FixtureRequest) -> AsyncIterator[MakePair]:
    """Makes pairs of open links: `await link_pair(role=..., settings=...)`."""
    make = {"memory": _memory_pair, "tcp": _tcp_pair, "tls": _tls_pair}[request.param]
    pairs: list[LinkPair] = []

    async def make_pair(
        *,
        role: Role = Role.MANAGER,
        settings: LinkSettings | None = None,
        listener_settings: LinkSettings | None = None,
    ) -> LinkPair:
        settings = settings or LinkSettings()
        pairs.append(await make(role, settings, listener_settings or settings))
        return pairs[-1]

    yield make_pair
    for pair in pairs:
        await asyncio.gather(pair.opener.close(), pair.listener.close())


async def _tls_pair(role: Role, settings: LinkSettings, listeners: LinkSettings) -> LinkPair:
    return await _tcp_pair(role, settings, listeners, tls_of_here())


async def _tcp_pair(
    role: Role, settings: LinkSettings, listeners: LinkSettings, tls: Tls | None = None
) -> LinkPair:
    accepted: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
    listener = await listen(
        "127.0.0.1:0",
        welcome=lambda hello: WELCOME,
        on_link=accepted.set_result,
        settings=listeners,
        tls=tls,
    )
    opener = await connect(listener.address, role=role, agent="test", settings=settings, tls=tls)
    pair = LinkPair(opener, await accepted)
    listener.stop()
    return pair


class _OpenDoor:
    def enter(self, link: Link, transport: asyncio.Transport) -> None:
        pass

    def greet(self, link: Link, hello: Hello) -> None:
        link.let_in(WELCOME)

    def leave(self, link: Link) -> None:
        pass


async def _memory_pair(role: Role, settings: LinkSettings, listeners: LinkSettings) -> LinkPair:
    hello = Hello(version=PROTOCOL_VERSION, role=role, agent="test")
    opener = Link(Session(OPENER, hello=hello), "worker.memory:1", settings)
    listener = Link(Session(LISTENER), "opener.memory:2", listeners, _OpenDoor())
    memory_transport.join(opener, listener)
    await asyncio.gather(opener.opened(), listener.opened())
    return LinkPair(opener, listener)
