"""A session on an event loop: what happens when bytes come, time passes, or the peer is gone.

A `Link` reads frames straight into their final memory, answers pings by itself, notices a peer
that went silent, and never lets more pile up than it was told. It does not know how connections
are made (`proto.link`), what may be said when (`proto.session`), nor what a step or a lease means
(its owner).

Works on asyncio's own loops and on uvloop. Everything here runs on the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import Final, Protocol, cast

from proto.backpressure import Inbox, Outbox
from proto.errors import (
    Error,
    PeerLost,
    ProtocolError,
    RemoteProtocolError,
    WorkerLoading,
    WorkerLost,
    WorkerRefused,
)
from proto.framing import Buffer, Frame
from proto.heartbeat import Heartbeat
from proto.link_settings import LinkSettings
from proto.messages import Goodbye, Hello, Message, Ping, Pong, Refused, Welcome
from proto.printable import printable
from proto.session import LISTENER_HANDSHAKE_BYTES, OPENER, Session, State

# A goodbye gets so long to reach the peer before the socket is closed under it.
LINGER_S: Final = 1.0

OnFrame = Callable[[Frame], None]
OnClosed = Callable[[Exception | None], None]


class Door(Protocol):
    """What a listener does for the links that it accepts."""

    def enter(self, link: Link, transport: asyncio.Transport) -> None:
        """A peer connected; nothing was read."""

    def greet(self, link: Link, hello: Hello) -> None:
        """The peer is proven and said who it is: `let_in` or `fail`."""

    def leave(self, link: Link) -> None:
        """The link ended."""


class Link(asyncio.BufferedProtocol):
    """One connection to a peer. Made by `connect` or by a `Listener`, not by hand."""

    def __init__(
        self, session: Session, peer: str, settings: LinkSettings, door: Door | None = None
    ) -> None:
        self.peer = peer  # HOST:PORT of the other end
        self.settings = settings
        self.welcome: Welcome | None = None  # an opener's: what the worker said of itself
        self.goodbye: str | None = None  # the reason in the peer's Goodbye, once it said one
        self.error: Exception | None = None  # what ended the link, if it was not on purpose
        self.received_bytes = 0
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._heartbeat = Heartbeat(settings.missed_heartbeats, settings.heartbeat_s)
        self._heard = True
        self._pings: dict[int, asyncio.Future[float]] = {}
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._was_open = self._ended = self._told = False
        self._door = door  # a listener's
        self._on_closed: OnClosed | None = None

        self._on_frame: OnFrame | None = None
        self._inbox = Inbox(settings.max_queued_frames)
        self._owner_rests = self._resting = False
        self._dropped_bytes = 0
        self._outbox = Outbox(settings.max_unsent_bytes, settings.stalled_s / settings.heartbeat_s)

        self._deadline: asyncio.TimerHandle | None = None
        self._beat_timer: asyncio.TimerHandle | None = None
        self._beat_due_s = 0.0
        self._linger_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Link {self.peer} {self._session.state.value}>"

    # -- what it is ----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether frames may be sent now."""
        return self._session.state is State.OPEN and not self._ended

    @property
    def hello(self) -> Hello:
        """What the opener said of itself (its own, on the opener's side)."""
        assert self._session.hello is not None
        return self._session.hello

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round trip of the pings; None before the first answer."""
        return self._heartbeat.rtt_s

    @property
    def clock_offset_s(self) -> float | None:
        """The peer's `time.monotonic()` minus ours, from the fastest of the last pings."""
        return self._heartbeat.clock_offset_s

    @property
    def unsent_bytes(self) -> int:
        """What was sent and has not reached the kernel."""
        return self._outbox.unsent_bytes

    @property
    def sent_bytes(self) -> int:
        """All that was sent, whether it has reached the kernel or not."""
        return self._outbox.sent_bytes

    async def opened(self) -> None:
        """Wait for the end of the handshake; raises what it failed with."""
        await asyncio.shield(self._opened)
        if self.error is not None:
            raise self.error

    # -- sending -------------------------------------------------------------------------------

    def send(self, message: Message, *payload: Buffer, epoch: int = 0) -> int:
        """Send one frame; returns its bytes at once, without waiting for the network.

        Payload buffers are not copied and may be read after this returns, until `unsent_bytes`
        is 0: nobody may write into them any more.

        Raises:
            PeerLost: the link is closed (WorkerLost on the opener's side), or is now, because
                the peer does not read.
            LocalProtocolError: the message may not be sent on this link now.
        """
        if self._ended:
            raise self._lost(self._why_ended())
        num_bytes = self._session.send(message, *payload, epoch=epoch)
        if not self._outbox.has_room(num_bytes):
            reason = f"it does not read: {self.unsent_bytes} bytes wait to be sent"
            self.abort(reason)
            raise self._lost(reason)
        self._flush()
        return num_bytes

    async def drain(self) -> None:
        """Wait until little enough is unsent; returns at once when the link is closed."""
        await self._outbox.wait()

    # -- receiving -----------------------------------------------------------------------------

    @property
    def on_frame(self) -> OnFrame | None:
        """Called with every frame as soon as its last byte is here; None: they queue.

        Frames that queued before it was set come first. An error that it raises closes the link.
        Ping, Pong and Goodbye are the link's own and never come here.
        """
        return self._on_frame

    @on_frame.setter
    def on_frame(self, on_frame: OnFrame | None) -> None:
        self._on_frame = on_frame
        while self._inbox and self._on_frame is not None:
            self._deliver(self._inbox.take())
        self._rest_or_read()

    async def receive(self, timeout_s: float | None = None) -> Frame:
        """The next frame, for owners without `on_frame`. One waits at a time.

        Raises:
            PeerLost: the link closed and nothing is queued, or nothing came in time, which
                closes it: an answer that comes late would be taken for the next one.
            Error: whatever else ended the link.
        """
        assert self._on_frame is None, "frames go to on_frame"
        if not self._inbox and not self._ended:
            try:
                await self._inbox.wait(timeout_s)
            except asyncio.TimeoutError:
                self.fail(self._lost(f"no answer within {timeout_s:g} s"))
        if not self._inbox:
            raise self.error or self._lost(self._why_ended())
        frame = self._inbox.take()
        self._rest_or_read()
        return frame

    def __aiter__(self) -> Link:
        return self

    async def __anext__(self) -> Frame:
        """The next frame; the iteration ends when the link was closed on purpose."""
        try:
            return await self.receive()
        except PeerLost:
            if self.error is None:
                raise StopAsyncIteration from None
            raise

    def pause_reading(self) -> None:
        """Take no more frames from the network, so that the peer has to wait.

        Our pings go on, so the peer knows that we live; whether it does, we cannot hear.
        """
        self._owner_rests = True
        self._rest_or_read()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        self._owner_rests = False
        self._rest_or_read()

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Ask now, and return the round trip in seconds.

        Raises:
            PeerLost: the link is closed, or no answer came in time (the link stays as it is).
        """
        now_s = time.monotonic()
        number = self._heartbeat.ping(now_s)
        answered: asyncio.Future[float] = self._loop.create_future()
        self.send(Ping(number=number))
        self._pings[number] = answered
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` can lose a cancellation
                return await answered
        except asyncio.TimeoutError:
            raise self._lost(f"no answer to a ping within {timeout_s:g} s") from None
        finally:
            self._pings.pop(number, None)

    # -- closing -------------------------------------------------------------------------------

    @property
    def on_closed(self) -> OnClosed | None:
        """Called once, from the event loop, when the link can no longer be used: with None after
        `close` or the peer's Goodbye (see `goodbye`), else with what went wrong.

        Set too late, it is called all the same.
        """
        return self._on_closed

    @on_closed.setter
    def on_closed(self, on_closed: OnClosed | None) -> None:
        self._on_closed = on_closed
        if self._ended:
            self._loop.call_soon(self._tell_closed)

    async def close(self, reason: str = "done") -> None:
        """Say goodbye, let it reach the peer, and be gone within a second or so."""
        self.close_soon(reason)
        await self.wait_closed()

    def close_soon(self, reason: str = "done") -> None:
        """`close` without waiting, for callbacks."""
        if not self._ended:
            self._session.give_up(reason)
            self._leave(None)

    async def wait_closed(self) -> None:
        """Wait until the socket is closed."""
        await asyncio.shield(self._gone)

    def fail(self, error: Exception) -> None:
        """Close because of `error`: the peer is told, `on_closed` gets it, `send` raises."""
        if not self._ended:
            reason = str(error) if isinstance(error, Error) else "an internal error"
            percent = error.percent if isinstance(error, WorkerLoading) else None
            self._session.give_up(reason, percent)
            self._leave(error)

    def fail_below(self, error: ProtocolError) -> None:
        """`fail` for the layer below, which does not know who the peer is."""
        self.fail(self._with_peer(error))

    def abort(self, reason: str) -> None:
        """Close at once, without a goodbye, because the peer does not listen any more."""
        self._session.give_up(reason)
        self._end(self._lost(reason))
        self._reset()

    # -- what the event loop calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._outbox.attach(self._transport)
        self._deadline = self._loop.call_later(
            self.settings.handshake_timeout_s, self._handshake_is_late
        )
        if self._door is not None:
            self._door.enter(self, self._transport)
        self._flush()

    def get_buffer(self, sizehint: int) -> Buffer:
        return self._session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._heard = True
        self.received_bytes += nbytes
        if self._ended:
            self._drop(nbytes)
            return
        try:
            frame = self._session.advance(nbytes)
            if frame is not None:
                own = self._OWN.get(type(frame.message))
                if own is None:
                    self._deliver(frame)
                else:
                    own(self, frame)
        except ProtocolError as exc:
            self.fail(self._with_peer(exc))
            return
        if not self._opened.done():
            self._flush()  # what the handshake answers

    def eof_received(self) -> bool:
        if not self._ended:
            try:
                self._session.receive_eof()
            except RemoteProtocolError as exc:
                self._session.give_up(str(exc))
                self._leave(self._lost(f"it closed the connection without a goodbye ({exc})"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._ended:
            reason = "the connection was closed without a goodbye"
            if exc is not None:
                reason = f"the connection broke ({os_reason(exc)})"
            self._session.give_up(reason)
            self._end(self._lost(reason))
        for timer in (self._deadline, self._beat_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._outbox.detach()
        if not self._gone.done():
            self._gone.set_result(None)

    def pause_writing(self) -> None:
        if not self._ended:
            self._outbox.stop()

    def resume_writing(self) -> None:
        self._outbox.go()

    # -- frames that are the link's own --------------------------------------------------------

    def _ping_came(self, frame: Frame) -> None:
        ping = cast(Ping, frame.message)
        with contextlib.suppress(PeerLost):
            self.send(Pong(number=ping.number, clock_s=time.monotonic()))

    def _pong_came(self, frame: Frame) -> None:
        pong = cast(Pong, frame.message)
        rtt_s = self._heartbeat.pong(pong.number, pong.clock_s, time.monotonic())
        waiter = self._pings.get(pong.number)
        if waiter is not None and rtt_s is not None and not waiter.done():
            waiter.set_result(rtt_s)

    def _goodbye_came(self, frame: Frame) -> None:
        self.goodbye = printable(cast(Goodbye, frame.message).reason)
        self._leave(None)

    def _hello_came(self, frame: Frame) -> None:
        assert self._door is not None
        self._door.greet(self, cast(Hello, frame.message))

    def _welcome_came(self, frame: Frame) -> None:
        self.welcome = cast(Welcome, frame.message)
        self._now_open()

    def _refused_came(self, frame: Frame) -> None:
        if self._was_open:
            self._deliver(frame)  # an answer like any other
        else:
            refused = cast(Refused, frame.message)
            if refused.loading_percent is not None:
                self._leave(WorkerLoading(self.peer, refused.loading_percent))
            else:
                reason = printable(refused.reason)
                self._leave(WorkerRefused(f"worker {self.peer} refused: {reason}"))

    _OWN: Final = {
        Ping: _ping_came,
        Pong: _pong_came,
        Goodbye: _goodbye_came,
        Hello: _hello_came,
        Welcome: _welcome_came,
        Refused: _refused_came,
    }

    def let_in(self, welcome: Welcome) -> None:
        """A listener's answer to Hello: the link is open from here on."""
        self._session.send(welcome)
        self._now_open()

    def _now_open(self) -> None:
        self._was_open = True
        self._flush()
        assert self._deadline is not None
        self._deadline.cancel()
        self._opened.set_result(None)
        self._set_beat(time.monotonic())
        self._send_ping()  # the first RTT at once

    def _deliver(self, frame: Frame) -> None:
        if self._on_frame is None:
            self._inbox.put(frame)
            self._rest_or_read()
            return
        try:
            self._on_frame(frame)
        except ProtocolError as exc:
            self.fail(self._with_peer(exc))
        except Exception as exc:
            self.fail(exc)
            if not isinstance(exc, Error):
                self._loop.call_exception_handler(
                    {"message": f"{self!r}: on_frame failed", "exception": exc, "protocol": self}
                )

    def _rest_or_read(self) -> None:
        resting = (self._owner_rests or self._inbox.full) and not self._ended
        transport = self._transport
        if transport is None or transport.is_closing() or resting == self._resting:
            return
        self._resting = resting
        if resting:
            transport.pause_reading()
        else:
            transport.resume_reading()

    # -- time ----------------------------------------------------------------------------------

    def _handshake_is_late(self) -> None:
        if not self._opened.done():
            self.fail(
                self._lost(
                    "it did not finish the handshake within "
                    f"{self.settings.handshake_timeout_s:g} s"
                )
            )

    def _beat(self) -> None:
        """Once an interval: is the peer alive, does it read, and tell it that we live."""
        now_s = time.monotonic()
        late_s = now_s - self._beat_due_s
        self._set_beat(now_s)
        heard, self._heard = self._heard, False
        if not self._heartbeat.beat(heard or self._resting, late_s):
            silent_s = self.settings.heartbeat_s * self.settings.missed_heartbeats
            self.abort(f"no answer for {silent_s:g} s")
        elif not self._outbox.stopped:
            self._send_ping()  # behind unsent bytes it would only add to them
        elif not self._outbox.beat():
            self.abort(f"it has not read for {self.settings.stalled_s:g} s")

    def _set_beat(self, now_s: float) -> None:
        self._beat_due_s = now_s + self.settings.heartbeat_s
        self._beat_timer = self._loop.call_later(self.settings.heartbeat_s, self._beat)

    def _send_ping(self) -> None:
        with contextlib.suppress(PeerLost):
            self.send(Ping(number=self._heartbeat.ping(time.monotonic())))

    # -- the end -------------------------------------------------------------------------------

    def _leave(self, error: Exception | None) -> None:
        """Let what is written go out, drop what still comes in, and be gone within LINGER_S.

        The socket is not closed at once: closing it with bytes unread makes the kernel send a
        reset, which can overtake our last words.
        """
        if self._ended:
            return
        self._flush()
        self._end(error)
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._linger_timer = self._loop.call_later(LINGER_S, self._reset)
        self._rest_or_read()
        try:
            if self.goodbye is None and transport.can_write_eof():
                transport.write_eof()
                return
        except (OSError, RuntimeError):  # the connection is closed under us, and nobody told yet
            pass
        transport.close()

    def _end(self, error: Exception | None) -> None:
        """From here on the link cannot be used."""
        if self._ended:
            return
        self._ended, self.error = True, error
        for timer in (self._deadline, self._beat_timer):
            if timer is not None:
                timer.cancel()
        if not self._opened.done():
            self._opened.set_result(None)
        for answered in self._pings.values():
            if not answered.done():
                answered.set_exception(self._lost(self._why_ended()))
        self._inbox.wake()
        self._outbox.go()
        self._loop.call_soon(self._tell_closed)

    def _tell_closed(self) -> None:
        if self._door is not None:
            self._door.leave(self)
            self._door = None
        if self._on_closed is not None and not self._told:
            self._told = True
            self._on_closed(self.error)

    def _drop(self, num_bytes: int) -> None:
        """What a peer still sends while we leave; one that was never let in gets no more of us."""
        self._dropped_bytes += num_bytes
        if not self._was_open and self._dropped_bytes > LISTENER_HANDSHAKE_BYTES:
            self._reset()

    def _reset(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- small things --------------------------------------------------------------------------

    def _flush(self) -> None:
        self._outbox.write(self._session.outgoing())

    def _lost(self, reason: str) -> PeerLost:
        if self._session.side is OPENER:
            return WorkerLost(self.peer, reason)
        return PeerLost(self.peer, reason)

    def _why_ended(self) -> str:
        if isinstance(self.error, PeerLost):
            return self.error.reason
        if self.error is not None:
            return str(self.error)
        if self.goodbye is not None:
            return f"it said goodbye: {self.goodbye}"
        return "this side closed the link"

    def _with_peer(self, exc: ProtocolError) -> ProtocolError:
        """The same error, saying who it was."""
        exc.args = (f"{self.peer}: {exc}",)
        return exc


def os_reason(exc: OSError | Exception) -> str:
    """What the system says, as part of a sentence."""
    code = getattr(exc, "errno", None)
    text = os.strerror(code) if code else str(exc)
    return text[:1].lower() + text[1:]
