"""Two transports that hand bytes to each other in memory, as an event loop would over TCP."""

from __future__ import annotations

import asyncio
from typing import Any


class MemoryTransport(asyncio.Transport):
    """One end; what is written here is read by `peer`'s protocol in a later turn of the loop."""

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self.protocol = protocol
        self.peer: MemoryTransport
        self._loop = asyncio.get_running_loop()
        self._unread = bytearray()  # written here, not yet taken by the peer
        self._high, self._low = 64 * 1024, 16 * 1024
        self._writing_paused = self._reading_paused = False
        self._eof = self._eof_told = self._closing = self._lost = False

    # -- writing

    def write(self, data: Any) -> None:
        if self._closing or self._eof:
            return
        self._unread += data
        if len(self._unread) > self._high and not self._writing_paused:
            self._writing_paused = True
            self.protocol.pause_writing()
        self._loop.call_soon(self.peer.read)

    def write_eof(self) -> None:
        self._eof = True
        self._loop.call_soon(self.peer.read)

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return len(self._unread)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high
        self._low = self._high // 4 if low is None else low

    # -- reading

    def read(self) -> None:
        source = self.peer
        while source._unread and not self._reading_paused and not self._lost:
            space = self.protocol.get_buffer(-1)
            taken = min(len(space), len(source._unread))
            space[:taken] = source._unread[:taken]
            del source._unread[:taken]
            self.protocol.buffer_updated(taken)
            source.wrote()
        at_end = source._eof and not source._unread and not self._reading_paused
        if at_end and not self._eof_told and not self._lost:
            self._eof_told = True
            if not self.protocol.eof_received():
                self.close()

    def wrote(self) -> None:
        if self._writing_paused and len(self._unread) <= self._low and not self._lost:
            self._writing_paused = False
            self.protocol.resume_writing()
        if self._closing and not self._unread:
            self._loop.call_soon(self._lose, None)

    def pause_reading(self) -> None:
        self._reading_paused = True

    def resume_reading(self) -> None:
        self._reading_paused = False
        self._loop.call_soon(self.read)

    # -- the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = self._eof = True
            self._loop.call_soon(self.peer.read)
            if not self._unread:
                self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        self._closing = True
        self._unread.clear()
        self._loop.call_soon(self._lose, None)
        self._loop.call_soon(self.peer._lose, ConnectionResetError(104, "reset"))

    def _lose(self, exc: Exception | None) -> None:
        if not self._lost:
            self._lost = self._closing = self._eof = True
            self.protocol.connection_lost(exc)
            self._loop.call_soon(self.peer.read)


def join(one: asyncio.BufferedProtocol, other: asyncio.BufferedProtocol) -> None:
    """Connect two protocols to each other."""
    ends = MemoryTransport(one), MemoryTransport(other)
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for end in reversed(ends):  # the listener hears of the connection first
        end.protocol.connection_made(end)
