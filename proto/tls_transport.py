"""TLS between a `Link` and its socket: ciphertext below, the link's own bytes above.

To the socket it is a protocol, to the link a transport, so that a link with TLS is the same link.
asyncio has such a layer; this one tells a listener of handshakes that fail, bounds what is read
before the peer has shown its certificate, decrypts straight into the memory of the frame, can close
one direction, and says on both sides when only one of them speaks TLS. Knows no frame.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from typing import Any, Final, Protocol, cast

from proto.errors import AuthenticationFailed, ProtocolError, RemoteProtocolError
from proto.framing import KIB, MAGIC, Buffer
from proto.tls import SPEAKS_NO_TLS, WANTS_TLS, explain

# A hello of 0.5 KiB and a certificate of 0.6 KiB; who has other certificates has larger ones.
HANDSHAKE_BYTES: Final = 16 * KIB
# What is taken from the socket at once, before and after the peer is known.
FIRST_READ_BYTES: Final = 4 * KIB
READ_BYTES: Final = 256 * KIB
# What is encrypted at once: nothing larger lies twice in memory.
WRITE_BYTES: Final = 256 * KIB

_RECORD_TYPES: Final = (0x15, 0x16)  # what a TLS stream begins with: an alert or a handshake


class _Stage(enum.Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    PLAIN = "plain"  # a peer without TLS, that is told so in its own words
    FAILED = "failed"
    DONE = "done"  # the peer writes nothing more


class Above(Protocol):
    """What the layer needs of a link."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def get_buffer(self, sizehint: int) -> Buffer: ...
    def buffer_updated(self, nbytes: int) -> None: ...
    def eof_received(self) -> bool: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def fail_below(self, error: ProtocolError) -> None: ...


class TlsLayer(asyncio.BufferedProtocol):
    """One connection's TLS."""

    def __init__(self, link: Above, context: ssl.SSLContext, host: str | None) -> None:
        """
        Args:
            host: that was dialled, which the certificate must be for; None for a listener.
        """
        self._link, self._host = link, host
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._in, self._out, server_side=host is None, server_hostname=host
        )
        self._stage = _Stage.HANDSHAKE
        self._handshake_bytes = 0
        self._space = memoryview(bytearray(FIRST_READ_BYTES))
        self._waiting: list[bytes] = []  # what the link wrote before the handshake was done
        self._waiting_eof = False
        self._is_paused = False
        self._raw: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()

    # -- what the event loop calls ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._link.connection_made(TlsTransport(self, self._raw))
        if self._host is not None and not self._raw.is_closing():
            self._handshake()

    def get_buffer(self, sizehint: int) -> Buffer:
        return self._space

    def buffer_updated(self, nbytes: int) -> None:
        came = self._space[:nbytes]
        if self._stage in (_Stage.FAILED, _Stage.PLAIN, _Stage.DONE):
            self._forget(nbytes)
            return
        if self._stage is _Stage.HANDSHAKE and not self._may_handshake(came):
            return
        self._in.write(came)
        if self._stage is _Stage.HANDSHAKE:
            self._handshake()
        if self._stage is _Stage.OPEN:
            self._deliver()

    def eof_received(self) -> bool:
        self._link.eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._stage = _Stage.DONE
        self._link.connection_lost(exc)

    def pause_writing(self) -> None:
        self._link.pause_writing()

    def resume_writing(self) -> None:
        self._link.resume_writing()

    # -- handshake -------------------------------------------------------------------------------

    def _may_handshake(self, came: memoryview) -> bool:
        if self._handshake_bytes == 0 and came[0] not in _RECORD_TYPES:
            self._peer_is_plain(bytes(came[: len(MAGIC)]))
            return False
        self._handshake_bytes += len(came)
        if self._handshake_bytes > HANDSHAKE_BYTES:
            self._fail(
                RemoteProtocolError(
                    f"it sent more than {HANDSHAKE_BYTES} bytes before it had shown a certificate"
                )
            )
            return False
        return True

    def _peer_is_plain(self, start: bytes) -> None:
        is_ours = MAGIC.startswith(start)
        self._stage = _Stage.PLAIN if is_ours else _Stage.FAILED
        self._waiting.clear()
        if self._host is None and is_ours:
            self._link.fail_below(AuthenticationFailed(WANTS_TLS))
        elif is_ours:
            self._link.fail_below(AuthenticationFailed(SPEAKS_NO_TLS))
        else:
            self._link.fail_below(
                RemoteProtocolError(f"what came does not begin TLS ({start!r}): {SPEAKS_NO_TLS}")
            )

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as exc:
            self._flush()  # the alert
            self._fail(explain(exc, self._host))
            return
        self._flush()
        self._stage = _Stage.OPEN
        self._space = memoryview(bytearray(READ_BYTES))
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self.write(data)
        if self._waiting_eof:
            self.write_eof()

    def _fail(self, error: ProtocolError) -> None:
        self._stage = _Stage.FAILED
        self._waiting.clear()
        self._link.fail_below(error)

    # -- in --------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        """All that can be decrypted, into the memory that the link has for it."""
        while self._stage is _Stage.OPEN and not self._is_paused:
            space = memoryview(self._link.get_buffer(-1))
            try:
                num_bytes = cast(int, self._tls.read(len(space), space))
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                num_bytes = 0
            except ssl.SSLError as exc:
                self._flush()
                self._fail(explain(exc, self._host))
                return
            if not num_bytes:
                self._stage = _Stage.DONE
                self._link.eof_received()
                self._close_raw()
                return
            self._link.buffer_updated(num_bytes)
        self._flush()  # what TLS itself answers

    def _forget(self, num_bytes: int) -> None:
        """The link counts what comes after the end, and cuts who goes on for too long."""
        while num_bytes:
            taken = min(num_bytes, len(self._link.get_buffer(-1)))
            self._link.buffer_updated(taken)
            num_bytes -= taken

    # -- out -------------------------------------------------------------------------------------

    def write(self, data: Buffer) -> None:
        assert self._raw is not None
        if self._stage is _Stage.PLAIN:
            self._raw.write(data)
            return
        if self._stage is _Stage.HANDSHAKE:
            self._waiting.append(bytes(data))
            return
        if self._stage is _Stage.FAILED:
            return
        rest = memoryview(data)
        while rest:
            try:
                written = self._tls.write(rest[:WRITE_BYTES])
            except ssl.SSLError:  # the connection is closed under us, which the loop will tell
                return
            rest = rest[written:]
            self._flush()

    def write_eof(self) -> None:
        assert self._raw is not None
        if self._stage is _Stage.HANDSHAKE:
            if self._host is None:  # a stranger gets no more work of us
                self._close_raw()
            self._waiting_eof = True
            return
        if self._stage in (_Stage.OPEN, _Stage.DONE):
            self._say_closed()
        if not self._raw.is_closing():
            self._raw.write_eof()

    def close(self) -> None:
        if self._stage in (_Stage.OPEN, _Stage.DONE):
            self._say_closed()
        self._close_raw()

    def _say_closed(self) -> None:
        try:
            self._tls.unwrap()
        except ssl.SSLError:  # the peer's own close_notify is still to come
            pass
        self._flush()

    def _close_raw(self) -> None:
        if self._raw is not None and not self._raw.is_closing():
            self._raw.close()

    def _flush(self) -> None:
        assert self._raw is not None
        if self._out.pending and not self._raw.is_closing():
            self._raw.write(self._out.read())

    # -- resting ---------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        assert self._raw is not None
        self._is_paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        assert self._raw is not None
        self._is_paused = False
        self._raw.resume_reading()
        self._loop.call_soon(self._deliver_rest)

    def _deliver_rest(self) -> None:
        """What was taken from the socket before the link rested."""
        if self._stage is _Stage.OPEN:
            self._deliver()


class TlsTransport(asyncio.Transport):
    """The link's side of a `TlsLayer`."""

    def __init__(self, layer: TlsLayer, raw: asyncio.Transport) -> None:
        super().__init__()
        self._layer, self._raw = layer, raw

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._raw.get_extra_info(name, default)

    def write(self, data: Buffer) -> None:
        self._layer.write(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._layer.write_eof()

    def close(self) -> None:
        self._layer.close()

    def abort(self) -> None:
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def pause_reading(self) -> None:
        self._layer.pause_reading()

    def resume_reading(self) -> None:
        self._layer.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._raw.set_write_buffer_limits(high, low)
