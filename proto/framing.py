"""Bytes in, frames out: the fixed header, the checksums, and the limits on what is allocated.

Sans-IO. The reader hands out the memory that the next bytes belong in, so a payload goes from the
socket to its final place without a copy. It knows which message a frame holds, not whether that
message may come now: `admit` is asked before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol
from zlib import crc32

from proto import codec
from proto.errors import (
    FrameCorrupt,
    FrameTooLarge,
    LocalProtocolError,
    RemoteProtocolError,
    VersionMismatch,
)
from proto.messages import Message
from proto.room import Room

Buffer = bytes | bytearray | memoryview

MAGIC: Final = b"CMBO"
TLS_HANDSHAKE: Final = b"\x16"  # the first byte of a connection with TLS
# Version of the header's layout. It stays while messages change (`PROTOCOL_VERSION`), so that two
# releases can still read each other's Hello and Refused.
FRAME_VERSION: Final = 1

# magic, frame version, type, reserved, epoch, metadata bytes, payload bytes, crc of the body;
# the crc of these 28 bytes follows them.
HEADER: Final = struct.Struct(">4sBBHIIQI")
CHECKSUM: Final = struct.Struct(">I")
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size

KIB: Final = 1024
MIB: Final = 1024 * KIB

# The largest metadata is a Step of MAX_RUNS = 4096 runs of at most 128 bytes each: 512 KiB.
MAX_METADATA_BYTES: Final = 1 * MIB
# The largest payload is one prefill chunk: 4096 tokens x 16384 wide x 2 bytes = 128 MiB, and its
# tables. Allow twice that, refuse more.
MAX_PAYLOAD_BYTES: Final = 256 * MIB
# The payload starts at a multiple of this within its buffer, whose own start malloc aligns to 16.
PAYLOAD_ALIGNMENT: Final = 64


class Limits(NamedTuple):
    """The most bytes that a frame may announce."""

    metadata_bytes: int = MAX_METADATA_BYTES
    payload_bytes: int = MAX_PAYLOAD_BYTES


DEFAULT_LIMITS: Final = Limits()


class Frame(NamedTuple):
    """One message as it crossed the link."""

    message: Message
    epoch: int
    payload: memoryview  # writable bytes of its own buffer; valid as long as somebody holds it


# --- out -------------------------------------------------------------------------------------


def encode_frame(
    message: Message,
    payload: Iterable[Buffer] = (),
    *,
    epoch: int = 0,
    limits: Limits = DEFAULT_LIMITS,
) -> list[Buffer]:
    """The buffers of one frame, in order; payload buffers are passed on, not copied.

    Raises:
        LocalProtocolError: the message or payload is not one that a peer would accept.
    """
    metadata = codec.encode(message)
    views = [_as_bytes(part) for part in payload]
    payload_bytes = sum(map(len, views))
    _check_outgoing(message, len(metadata), payload_bytes, epoch, limits)
    checksum = crc32(metadata)
    for view in views:
        checksum = crc32(view, checksum)
    header = HEADER.pack(
        MAGIC, FRAME_VERSION, message.TAG, 0, epoch, len(metadata), payload_bytes, checksum
    )
    return [b"".join((header, CHECKSUM.pack(crc32(header)), metadata)), *views]


def _as_bytes(part: Buffer) -> Buffer:
    """A flat view of single bytes of any contiguous buffer, so that `len` counts bytes."""
    if isinstance(part, bytes):
        return part
    view = memoryview(part)
    if view.nbytes == 0:
        return b""
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")


def _check_outgoing(
    message: Message, metadata_bytes: int, payload_bytes: int, epoch: int, limits: Limits
) -> None:
    name, most = type(message).__name__, _most_payload_bytes(type(message), limits)
    if metadata_bytes > limits.metadata_bytes or payload_bytes > most:
        raise LocalProtocolError(
            f"cannot send {name}: {metadata_bytes} bytes of metadata and {payload_bytes} of "
            f"payload, the limits are {limits.metadata_bytes} and {most}"
        )
    if payload_bytes and not message.HAS_PAYLOAD:
        raise LocalProtocolError(f"cannot send {name} with a payload: it carries none")
    if not 0 <= epoch < 2**32:
        raise LocalProtocolError(f"cannot send {name}: epoch {epoch} does not fit 32 bits")


def _most_payload_bytes(kind: type[Message], limits: Limits) -> int:
    """What a link allows, or the message itself."""
    own = kind.MAX_PAYLOAD_BYTES
    return limits.payload_bytes if own is None else min(own, limits.payload_bytes)


# --- in --------------------------------------------------------------------------------------


class TakesBytes(Protocol):
    """Whatever is handed its bytes through a buffer of its own: a reader, a session."""

    def get_buffer(self) -> memoryview: ...

    def advance(self, num_bytes: int) -> Frame | None: ...


def feed(taker: TakesBytes, data: Buffer) -> list[Frame]:
    """Hand `data` over, with one copy; returns the frames that it completes."""
    frames = []
    rest = memoryview(data)
    while rest:
        space = taker.get_buffer()
        taken = min(len(space), len(rest))
        space[:taken] = rest[:taken]
        rest = rest[taken:]
        frame = taker.advance(taken)
        if frame is not None:
            frames.append(frame)
    return frames


class FrameReader:
    """Collects frames from a stream of bytes; after an error it is not used again."""

    def __init__(
        self,
        limits: Limits = DEFAULT_LIMITS,
        admit: Callable[[type[Message]], None] | None = None,
        room: Room | None = None,
    ) -> None:
        """
        Args:
            admit: raises when this message may not come now.
            room: that this reader shares with others.
        """
        self.limits = limits
        self._admit, self._room = admit, room
        self._taken_bytes = 0  # of the room
        self._header_space = memoryview(bytearray(HEADER_BYTES))
        self._space = self._header_space  # where the next bytes belong
        self._kind: type[Message] | None = None  # None: the header is being read
        self._epoch = 0
        self._metadata = self._payload = memoryview(b"")
        self._checksum = self._expected_checksum = 0

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where to write the next bytes: never empty, never past the end of this frame."""
        return self._space

    def advance(self, num_bytes: int) -> Frame | None:
        """So many bytes were written into `get_buffer()`; the frame that they complete.

        Raises:
            RemoteProtocolError: or one of its kinds, as soon as the bytes show it.
        """
        space = self._space
        if num_bytes < len(space):
            self._advance_within(space, num_bytes)
            return None
        if self._kind is None:
            self._read_header()
            if self._space:
                return None
        else:
            # The checksum grows as bytes come: they are still in the processor's cache, and the
            # last byte of a large frame is not followed by a pass over all of it.
            self._checksum = crc32(space, self._checksum)
        return self._complete()

    def receive(self, data: Buffer) -> list[Frame]:
        """All frames that `data` completes, by the same path with one copy."""
        return feed(self, data)

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and is not complete."""
        return self._kind is not None or len(self._space) < HEADER_BYTES

    def forget(self) -> None:
        """Nothing more is read: let go of the frame that has begun."""
        self._space, self._kind = self._header_space, None
        self._metadata = self._payload = self._header_space[:0]
        self._give_back()

    def receive_eof(self) -> None:
        """The stream ended; raises RemoteProtocolError inside a frame."""
        if self._kind is not None:
            raise RemoteProtocolError(
                f"the stream ended inside {self._kind.__name__}, "
                f"{len(self._space)} bytes before its part was complete"
            )
        if self.mid_frame:
            raise RemoteProtocolError(
                f"the stream ended inside a header, after {HEADER_BYTES - len(self._space)} "
                f"of {HEADER_BYTES} bytes"
            )

    def _advance_within(self, space: memoryview, num_bytes: int) -> None:
        if self._kind is None:
            have = HEADER_BYTES - len(space) + num_bytes
            _check_magic(bytes(self._header_space[: min(have, len(MAGIC))]))
        else:
            self._checksum = crc32(space[:num_bytes], self._checksum)
        self._space = space[num_bytes:]

    def _read_header(self) -> None:
        header = self._header_space
        magic, version, tag, reserved, epoch, metadata_bytes, payload_bytes, checksum = (
            HEADER.unpack_from(header)
        )
        _check_magic(magic)
        if CHECKSUM.unpack_from(header, HEADER.size)[0] != crc32(header[: HEADER.size]):
            raise FrameCorrupt("a frame's header does not match its checksum")
        if version != FRAME_VERSION:
            raise VersionMismatch(FRAME_VERSION, version)
        if reserved != 0:
            raise FrameCorrupt(f"a frame's reserved field is {reserved}, not 0")
        kind = codec.kind_of(tag)
        if self._admit is not None:
            self._admit(kind)
        if metadata_bytes > self.limits.metadata_bytes:
            raise FrameTooLarge("metadata", metadata_bytes, self.limits.metadata_bytes)
        most = _most_payload_bytes(kind, self.limits)
        if payload_bytes > most:
            raise FrameTooLarge("payload", payload_bytes, most)
        if payload_bytes and not kind.HAS_PAYLOAD:
            raise RemoteProtocolError(f"{kind.__name__} announces a payload: it carries none")
        self._kind, self._epoch, self._expected_checksum = kind, epoch, checksum
        self._allocate(metadata_bytes, payload_bytes)

    def _allocate(self, metadata_bytes: int, payload_bytes: int) -> None:
        """One buffer for the body, padded in front so that the payload is aligned."""
        padding = -metadata_bytes % PAYLOAD_ALIGNMENT if payload_bytes else 0
        payload_at = padding + metadata_bytes
        if self._room is not None:
            self._taken_bytes = self._room.take(payload_at + payload_bytes)
        body = memoryview(bytearray(payload_at + payload_bytes))
        self._space = body[padding:]
        self._metadata = body[padding:payload_at]
        self._payload = body[payload_at:]
        self._checksum = 0

    def _complete(self) -> Frame:
        kind, payload = self._kind, self._payload
        assert kind is not None
        if self._checksum != self._expected_checksum:
            raise FrameCorrupt(f"the body of {kind.__name__} does not match its checksum")
        message = codec.decode(kind.TAG, self._metadata)
        self.forget()  # the frame alone keeps its body
        return Frame(message, self._epoch, payload)

    def _give_back(self) -> None:
        if self._room is not None:
            self._room.give_back(self._taken_bytes)
            self._taken_bytes = 0


def _check_magic(start: bytes) -> None:
    """As soon as one byte is wrong: another protocol's peer may never send 32 of them."""
    if start[:1] == TLS_HANDSHAKE:
        raise FrameCorrupt(
            "the other side speaks TLS and this side does not: leave out --tls-cert, --tls-key and "
            "--tls-ca there, or pass them here too"
        )
    if not MAGIC.startswith(start):
        raise FrameCorrupt(
            f"what came does not begin a frame ({start!r} instead of {MAGIC!r}): "
            "the other side does not speak Comboio's protocol, or lost its place in the stream"
        )
