"""A peer that knows the secret and keeps no rule: it says what it is told to, allowed or not.

What the worker answers goes through a `Session`, so an answer that this role may not get, or a
frame that is none, is an error here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable
from zlib import crc32

import msgspec

from proto.framing import CHECKSUM, FRAME_VERSION, HEADER, MAGIC, Frame
from proto.messages import PROTOCOL_VERSION, Goodbye, Hello, Message, Role
from proto.session import OPENER, Session, State

ENCODER = msgspec.msgpack.Encoder()


class Peer:
    """One link of it, its handshake done. `said` grows with what the worker says."""

    def __init__(self, session: Session) -> None:
        self.said: list[Message] = []
        self.is_over = False  # the worker closed the link
        self._is_shut = False  # nothing more can be said
        self._session = session
        self._news = asyncio.Event()
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._task: asyncio.Task[None]

    @classmethod
    async def open(cls, address: str, role: Role, lease: bytes | None, secret: bytes) -> Peer:
        """Knock; what the worker says to that is in `said`, a refusal as well."""
        hello = Hello(version=PROTOCOL_VERSION, role=role, agent="fuzz", lease=lease)
        peer = cls(Session(OPENER, hello=hello, secret=secret, nonce=os.urandom(32)))
        host, port = address.rsplit(":", 1)
        peer._reader, peer._writer = await asyncio.open_connection(host, int(port))
        peer._task = asyncio.get_running_loop().create_task(peer._listen())
        peer._writer.writelines(peer._session.outgoing())
        await peer.until(lambda: peer._session.state is State.OPEN, 30.0)
        return peer

    def say(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        if not self.is_over and not self._is_shut and not self._writer.is_closing():
            self._writer.write(data)

    async def until(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until it is so or the link is over; False when neither comes in time."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_so() and not self.is_over:
                    self._news.clear()
                    await self._news.wait()
        return is_so() or self.is_over

    def rest(self) -> None:
        """Read nothing more."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def shut(self) -> None:
        """Say nothing more, and read on."""
        if not self._is_shut and not self._writer.is_closing():
            self._is_shut = True
            with contextlib.suppress(OSError):
                self._writer.write_eof()

    def reset(self) -> None:
        """Be gone, as a process that was killed."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """The end, however far it came."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.transport.abort()
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            raise error

    async def _listen(self) -> None:
        try:
            while data := await self._reader.read(65536):
                self._take(self._session.receive(data))
                self.say(b"".join(self._session.outgoing()))
                self._news.set()
        except OSError:
            pass
        finally:
            self.is_over = True
            self._news.set()

    def _take(self, frames: list[Frame]) -> None:
        self.said += [frame.message for frame in frames]

    @property
    def goodbye(self) -> str:
        """The reason in the worker's Goodbye, if it said one."""
        return next((it.reason for it in self.said if isinstance(it, Goodbye)), "")


def frame_of(message: Message, payload: bytes = b"", epoch: int = 0) -> bytes:
    """A frame whose checksums fit, whether or not any peer would accept the message."""
    metadata = ENCODER.encode(message)
    return header_of(message.TAG, metadata, payload, epoch) + metadata + payload


def header_of(tag: int, metadata: bytes, payload: bytes, epoch: int) -> bytes:
    """The header that goes before these."""
    return announcing(tag, len(metadata), len(payload), crc32(payload, crc32(metadata)), epoch)


def announcing(tag: int, metadata: int, payload: int, checksum: int = 0, epoch: int = 0) -> bytes:
    """A header that says so many bytes come."""
    try:
        header = HEADER.pack(
            MAGIC, FRAME_VERSION, tag, 0, epoch % 2**32, metadata, payload, checksum
        )
    except struct.error as exc:
        raise AssertionError(f"no header has {metadata} and {payload} bytes") from exc
    return header + CHECKSUM.pack(crc32(header))
