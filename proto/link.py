"""Make and accept links: the one file here that opens sockets.

`connect` and `listen` return links whose handshake is done. What a link does from then on stands
in `proto.link_protocol`; what may be said on it in `proto.session`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import secrets
import socket
from collections.abc import Callable
from typing import Final

from proto.address import Address, parse_address
from proto.auth import NONCE_BYTES
from proto.errors import Error, UsageError, WorkerUnreachable
from proto.framing import DEFAULT_LIMITS, MAX_PAYLOAD_BYTES, Limits
from proto.link_protocol import Link, os_reason
from proto.link_settings import DEFAULT_SETTINGS, LISTENER_SETTINGS, LinkSettings
from proto.messages import PROTOCOL_VERSION, Hello, Role, Welcome
from proto.room import Room
from proto.session import LISTENER, OPENER, Session
from proto.tls import Tls
from proto.tls_transport import TlsLayer

__all__ = ["Link", "LinkSettings", "Listener", "connect", "listen"]

# Peers whose handshake is not done, at 4 KiB and one socket each. A manager opens one link to
# every worker and a worker one to the next, so many at once come only from somebody else.
MAX_UNPROVEN: Final = 32
# Links of one worker: a few managers, their leases' neighbours, people who look at its status.
MAX_LINKS: Final = 256
# Of frames that have begun and are not complete, over all links: two of the largest.
MAX_COMING_BYTES: Final = 2 * MAX_PAYLOAD_BYTES


async def connect(
    address: str,
    *,
    role: Role,
    agent: str,
    lease: bytes | None = None,
    secret: bytes | None = None,
    tls: Tls | None = None,
    timeout_s: float = 5.0,
    check: Callable[[Welcome], None] | None = None,
    settings: LinkSettings = DEFAULT_SETTINGS,
) -> Link:
    """Open a link to the worker at `address`; what it holds is then in `link.welcome.worker`.

    Args:
        address: HOST:PORT or [IPV6]:PORT.
        agent: name and version of this program, for the worker's log.
        lease: for Role.NEIGHBOUR, the lease whose steps this link will carry.
        secret: what `proto.secret.read_secret_file` read; None where the worker has none.
        tls: what `proto.tls.read_tls` read; None where the worker speaks no TLS.
        timeout_s: for the connection, and again for the handshake.
        check: raises an `Error` when the Welcome does not suit; the worker is told why.
    Raises:
        UsageError: `address` is not one.
        WorkerUnreachable: nobody accepts connections there.
        WorkerRefused: the worker said no.
        WorkerLost: it fell silent or closed in the middle of the handshake.
        AuthenticationFailed, RemoteProtocolError: it does not know the secret, its certificate is
            not one that we trust, or it does not speak the protocol.
    """
    target = parse_address(address)
    if target.port == 0:
        raise UsageError(f"{address!r} has port 0: no worker can be reached there")
    hello = Hello(version=PROTOCOL_VERSION, role=role, agent=agent, lease=lease)
    settings = dataclasses.replace(settings, handshake_timeout_s=timeout_s)
    session = Session(
        OPENER, hello=hello, secret=secret, nonce=_nonce(secret), limits=_limits(settings)
    )
    link = await _open_socket(target, Link(session, str(target), settings), tls, timeout_s)
    try:
        await link.opened()
        if check is not None:
            assert link.welcome is not None
            check(link.welcome)
    except Error as exc:
        link.fail(exc)
        await link.wait_closed()  # soon, or when the link has lingered: no socket is left behind
        raise
    except BaseException:
        link.close_soon("the opener gave up")
        raise
    return link


async def _open_socket(target: Address, link: Link, tls: Tls | None, timeout_s: float) -> Link:
    protocol = link if tls is None else TlsLayer(link, tls.opener, target.host)
    loop = asyncio.get_running_loop()
    opening = loop.create_connection(lambda: protocol, target.host, target.port)
    try:
        async with asyncio.timeout(timeout_s):  # `wait_for` can lose a cancellation
            transport, _ = await opening
    except (asyncio.TimeoutError, OSError, ValueError) as exc:
        link.abort("the connection came too late")
        raise WorkerUnreachable(str(target), _why_not(exc, timeout_s)) from exc
    except BaseException:  # given up: the loop closes the connection, and tells the link nothing
        link.abort("the opener gave up")
        raise
    _tune(transport)
    return link


def _why_not(exc: BaseException, timeout_s: float) -> str:
    if isinstance(exc, (socket.gaierror, ValueError)):  # or it cannot even be asked for
        return "the name cannot be resolved"
    if isinstance(exc, OSError) and exc.errno is not None:
        return os_reason(exc)
    if isinstance(exc, asyncio.TimeoutError):
        return f"no connection within {timeout_s:g} s"
    return str(exc)  # several addresses of one name, each with its own error


class Listener:
    """A bound address that accepts links. Made by `listen`."""

    def __init__(
        self,
        *,
        welcome: Callable[[Hello], Welcome],
        on_link: Callable[[Link], None],
        on_refused: Callable[[str, Exception], None] | None,
        secret: bytes | None,
        tls: Tls | None,
        settings: LinkSettings,
        max_unproven: int,
        max_links: int,
    ) -> None:
        self.address = ""  # HOST:PORT as it is bound
        self._welcome, self._on_link, self._on_refused = welcome, on_link, on_refused
        self._secret, self._tls, self._settings = secret, tls, settings
        self._max_unproven, self._max_links = max_unproven, max_links
        self._unproven: set[Link] = set()
        self._links: set[Link] = set()
        self._room = Room(MAX_COMING_BYTES)
        self._server: asyncio.AbstractServer | None = None

    @property
    def links(self) -> frozenset[Link]:
        """The open ones."""
        return frozenset(self._links)

    @property
    def unproven(self) -> int:
        """How many peers are in the middle of their handshake."""
        return len(self._unproven)

    def stop(self) -> None:
        """Accept no more; open links stay."""
        assert self._server is not None
        self._server.close()

    async def close(self, reason: str = "the worker is shutting down") -> None:
        """Accept no more, say goodbye on every link, and wait until all are closed."""
        self.stop()
        links = self._links | self._unproven
        for link in links:
            link.close_soon(reason)
        await asyncio.gather(*(link.wait_closed() for link in links))

    async def _serve(self, sock: socket.socket) -> None:
        try:
            self._server = await asyncio.get_running_loop().create_server(self._accept, sock=sock)
        except BaseException:
            sock.close()
            raise
        self.address = str(Address(*sock.getsockname()[:2]))

    def _accept(self) -> asyncio.BaseProtocol:
        session = Session(
            LISTENER,
            secret=self._secret,
            nonce=_nonce(self._secret),
            limits=_limits(self._settings),
            room=self._room,
        )
        link = Link(session, "", self._settings, door=self)
        return link if self._tls is None else TlsLayer(link, self._tls.listener, None)

    def enter(self, link: Link, transport: asyncio.Transport) -> None:
        _tune(transport)
        peer = transport.get_extra_info("peername")
        link.peer = str(Address(*peer[:2])) if isinstance(peer, tuple) else "a local peer"
        self._unproven.add(link)
        if len(self._unproven) > self._max_unproven:
            link.fail(UsageError("too many links are being opened to this worker: try again"))
        elif len(self._links) >= self._max_links:
            link.fail(UsageError(f"this worker has {len(self._links)} links: it takes no more"))

    def greet(self, link: Link, hello: Hello) -> None:
        try:
            welcome = self._welcome(hello)
        except Error as exc:
            link.fail(exc)
            return
        link.let_in(welcome)
        self._unproven.discard(link)
        self._links.add(link)
        self._on_link(link)

    def leave(self, link: Link) -> None:
        self._links.discard(link)
        if link in self._unproven:
            self._unproven.discard(link)
            if self._on_refused is not None and link.error is not None:
                self._on_refused(link.peer, link.error)


async def listen(
    address: str,
    *,
    welcome: Callable[[Hello], Welcome],
    on_link: Callable[[Link], None],
    on_refused: Callable[[str, Exception], None] | None = None,
    secret: bytes | None = None,
    tls: Tls | None = None,
    settings: LinkSettings = LISTENER_SETTINGS,
    max_unproven: int = MAX_UNPROVEN,
    max_links: int = MAX_LINKS,
) -> Listener:
    """Accept links at `address` (port 0: a free one) until the listener is closed.

    Args:
        welcome: the answer to a Hello; an `Error` that it raises is the peer's refusal.
        on_link: gets every link as it opens, and sets its `on_frame` and `on_closed`.
        on_refused: gets the address and the error of every peer whose handshake failed.
        secret: what peers must know; None to let in anyone.
        tls: what peers must show a certificate of the same authority for; None: no TLS.
        max_unproven: peers in the middle of their handshake at one time.
    Raises:
        UsageError: `address` is not one, is not this machine's, or is in use.
    """
    listener = Listener(
        welcome=welcome,
        on_link=on_link,
        on_refused=on_refused,
        secret=secret,
        tls=tls,
        settings=settings,
        max_unproven=max_unproven,
        max_links=max_links,
    )
    wanted = parse_address(address)
    try:
        sock = await _bind(wanted)
        await listener._serve(sock)
    except (OSError, ValueError) as exc:
        raise UsageError(_cannot_listen(address, exc)) from exc
    return listener


async def _bind(wanted: Address) -> socket.socket:
    """A socket at one address of the name, so that port 0 is one port; IPv4 first."""
    found = await asyncio.get_running_loop().getaddrinfo(
        wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(address: str, exc: OSError | ValueError) -> str:
    if isinstance(exc, (socket.gaierror, ValueError)):
        return f"cannot listen on {address}: the name cannot be resolved; pass an IP address"
    if exc.errno == errno.EADDRINUSE:
        return (
            f"cannot listen on {address}: the port is in use; stop the process that has it, or "
            "pass --listen HOST:PORT with another port (port 0 picks a free one)"
        )
    if exc.errno == errno.EADDRNOTAVAIL:
        return (
            f"cannot listen on {address}: this machine has no such address; pass --listen with "
            "one that it has, or 0.0.0.0:PORT for all of them"
        )
    return f"cannot listen on {address}: {os_reason(exc)}; pass another --listen HOST:PORT"


def _tune(transport: asyncio.BaseTransport) -> None:
    """A step must not wait for more bytes to fill a packet, and a dead peer's socket must die."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _nonce(secret: bytes | None) -> bytes | None:
    return None if secret is None else secrets.token_bytes(NONCE_BYTES)


def _limits(settings: LinkSettings) -> Limits:
    return DEFAULT_LIMITS._replace(payload_bytes=settings.max_payload_bytes)
