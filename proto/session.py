"""The order of a link: who may say what, and when; handshake, conversation and close.

Sans-IO: bytes in, frames and bytes out. `TRANSITIONS` and `CONVERSATION` are all there is to
know; `docs/protocol.md` is made from them. Knows no clock and no socket: deadlines and
heartbeats are `proto.link`'s.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from proto import auth
from proto.errors import (
    AuthenticationFailed,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from proto.framing import (
    DEFAULT_LIMITS,
    Buffer,
    Frame,
    FrameReader,
    Limits,
    encode_frame,
    feed,
)
from proto.messages import (
    MAX_REASON_CHARS,
    PROTOCOL_VERSION,
    AdapterDone,
    AdapterRefused,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    Challenge,
    DropAdapter,
    Goodbye,
    Hello,
    HoldSection,
    KeepAdapter,
    Lease,
    Leased,
    LinkLost,
    Message,
    Ping,
    Pong,
    Proof,
    ProofAccepted,
    Refused,
    Release,
    ReleaseAdapter,
    Role,
    Route,
    Routed,
    SectionHeld,
    SectionLoading,
    SectionRefused,
    Status,
    StatusRequest,
    Step,
    StepDone,
    StepReport,
    UseAdapter,
    Welcome,
)
from proto.room import Room


class Side(Enum):
    """Which end of a link."""

    OPENER = "opener"  # made the connection, speaks first
    LISTENER = "listener"  # accepted it


class State(Enum):
    """Where a link stands; both ends pass through the same states."""

    UNPROVEN = "unproven"  # with a secret: nothing was said yet
    CHALLENGED = "challenged"  # the opener's nonce is known
    ANSWERED = "answered"  # both nonces are known
    PROVEN = "proven"  # the opener showed that it knows the secret
    UNGREETED = "ungreeted"  # both know it, or there is none: the conversation may begin
    GREETED = "greeted"  # the opener said who it is
    OPEN = "open"
    CLOSED = "closed"


OPENER: Final = Side.OPENER
LISTENER: Final = Side.LISTENER

# A link with a secret starts in UNPROVEN, one without in UNGREETED.
TRANSITIONS: Final[dict[tuple[State, Side, type[Message]], State]] = {
    (State.UNPROVEN, OPENER, Challenge): State.CHALLENGED,
    (State.CHALLENGED, LISTENER, Challenge): State.ANSWERED,
    (State.ANSWERED, OPENER, Proof): State.PROVEN,
    (State.PROVEN, LISTENER, ProofAccepted): State.UNGREETED,
    (State.UNGREETED, OPENER, Hello): State.GREETED,
    (State.GREETED, LISTENER, Welcome): State.OPEN,
    (State.UNPROVEN, LISTENER, Refused): State.CLOSED,
    (State.CHALLENGED, LISTENER, Refused): State.CLOSED,
    (State.ANSWERED, LISTENER, Refused): State.CLOSED,
    (State.PROVEN, LISTENER, Refused): State.CLOSED,
    (State.UNGREETED, LISTENER, Refused): State.CLOSED,
    (State.GREETED, LISTENER, Refused): State.CLOSED,
    (State.OPEN, OPENER, Goodbye): State.CLOSED,
    (State.OPEN, LISTENER, Goodbye): State.CLOSED,
}

# What each side may say on an open link, by the role that the opener's Hello named.
CONVERSATION: Final[dict[tuple[Role, Side], frozenset[type[Message]]]] = {
    (Role.MANAGER, OPENER): frozenset(
        {
            *(Lease, Route, Release, Step, StatusRequest, Ping, Pong),
            *(AdaptersRequest, AddAdapter, KeepAdapter, DropAdapter, UseAdapter, ReleaseAdapter),
            HoldSection,
        }
    ),
    (Role.MANAGER, LISTENER): frozenset(
        {
            *(Leased, Refused, Routed, LinkLost, StepDone, StepReport, Status, Ping, Pong),
            *(Adapters, AdapterDone, AdapterRefused),
            *(SectionLoading, SectionHeld, SectionRefused),
        }
    ),
    (Role.NEIGHBOUR, OPENER): frozenset({Step, Ping, Pong}),
    (Role.NEIGHBOUR, LISTENER): frozenset({Ping, Pong}),
    (Role.OBSERVER, OPENER): frozenset({StatusRequest, AdaptersRequest, Ping, Pong}),
    (Role.OBSERVER, LISTENER): frozenset({Status, Adapters, Ping, Pong}),
}

# A listener gives a peer that has shown nothing yet 4 KiB for all that it says before Welcome:
# Challenge, Proof and a Hello of the longest agent name are 1.3 KiB with their headers.
LISTENER_HANDSHAKE_BYTES: Final = 4 * 1024
# An opener called an address that its user chose: a Welcome whose texts are all at their bounds,
# 4096 + 6 x 256 characters of up to 4 bytes, is 22 KiB.
OPENER_HANDSHAKE_BYTES: Final = 32 * 1024
# What comes after the close is read into so much memory and forgotten.
DROP_BYTES: Final = 4 * 1024


class Session:
    """One end of a link, without the socket."""

    def __init__(
        self,
        side: Side,
        *,
        hello: Hello | None = None,
        secret: bytes | None = None,
        nonce: bytes | None = None,
        limits: Limits = DEFAULT_LIMITS,
        room: Room | None = None,
    ) -> None:
        """An opener gives its `hello`; whoever has a `secret` gives a fresh random `nonce`.

        Args:
            room: for what comes, shared with other sessions.
        """
        assert (side is OPENER) == (hello is not None)
        assert (secret is None) == (nonce is None)
        self.side = side
        self.peer_side = LISTENER if side is OPENER else OPENER
        self.state = State.UNGREETED if secret is None else State.UNPROVEN
        self.hello = hello  # an opener's own; a listener's peer's, once it came
        self._secret = secret
        self._nonces = {side: nonce}
        self._limits = limits
        self._outgoing: list[Buffer] = []
        self._may_send: frozenset[type[Message]] = frozenset()
        self._may_receive: frozenset[type[Message]] = frozenset()
        self._handshake_bytes = (
            OPENER_HANDSHAKE_BYTES if side is OPENER else LISTENER_HANDSHAKE_BYTES
        )
        self._reader = FrameReader(Limits(self._handshake_bytes, 0), self._admit, room)
        self._dropped = memoryview(bytearray(DROP_BYTES))
        self._begin()

    # -- what the shell calls ------------------------------------------------------------------

    def send(self, message: Message, *payload: Buffer, epoch: int = 0) -> int:
        """Put one frame into `outgoing()`; returns its bytes.

        Raises:
            LocalProtocolError: the message may not be sent now, or no peer would accept it.
        """
        kind = type(message)
        if kind not in self._may_send:
            self._check_order(self.side, kind)
        buffers = encode_frame(message, payload, epoch=epoch, limits=self._limits)
        self._outgoing += buffers
        if kind not in self._may_send:
            self._follow(self.side, kind)
        return sum(map(len, buffers))

    def outgoing(self) -> list[Buffer]:
        """What is to be written, in order; asked after every other call."""
        buffers, self._outgoing = self._outgoing, []
        return buffers

    def get_buffer(self, sizehint: int = -1) -> memoryview:
        """Where the next bytes from the peer belong."""
        if self.state is State.CLOSED:
            return self._dropped
        return self._reader.get_buffer(sizehint)

    def advance(self, num_bytes: int) -> Frame | None:
        """So many bytes were written into `get_buffer()`; the frame that they complete.

        Frames of the secret's exchange are dealt with here and not returned. On an error the
        link is closed, and `outgoing()` has a sentence for the peer. What comes on a closed link
        is dropped: both ends may say Goodbye at the same time.

        Raises:
            AuthenticationFailed: the peer does not know the secret, or only one end has one.
            RemoteProtocolError: anything else that the peer should not have sent.
        """
        if self.state is State.CLOSED:
            return None
        if self.state is not State.OPEN:
            self._spend(num_bytes)
        try:
            frame = self._reader.advance(num_bytes)
            if frame is None or type(frame.message) in self._may_receive:
                return frame
            return self._step_on(frame)
        except ProtocolError as exc:
            self.give_up(str(exc))
            raise

    def receive(self, data: Buffer) -> list[Frame]:
        """All frames that `data` completes, by the same path with one copy."""
        return feed(self, data)

    def receive_eof(self) -> None:
        """The peer sends nothing more; raises RemoteProtocolError unless that was announced."""
        if self.state is State.CLOSED:
            return
        self._reader.receive_eof()
        raise RemoteProtocolError(
            f"the {self.peer_side.value} closed the link while it was {self.state.value}"
        )

    def give_up(self, reason: str, loading_percent: int | None = None) -> None:
        """Close now, with a sentence for the peer where this side may still say one."""
        reason = reason.encode("utf-8", "replace").decode("utf-8")[:MAX_REASON_CHARS]
        farewell: Message
        if self.state is State.OPEN:
            farewell = Goodbye(reason=reason)
        elif self.side is LISTENER and self.state is not State.CLOSED:
            farewell = Refused(reason=reason, loading_percent=loading_percent)
        else:
            self._close()
            return
        self.send(farewell)

    # -- order ---------------------------------------------------------------------------------

    def _admit(self, kind: type[Message]) -> None:
        """Asked by the reader as soon as it knows what comes, before it makes room for it."""
        if kind in self._may_receive:
            return
        if self.side is LISTENER and self.state is State.UNPROVEN and kind is Hello:
            raise AuthenticationFailed(
                "this worker wants a secret: pass --secret-file with the file it was started with"
            )
        if self.side is LISTENER and self.state is State.UNGREETED and kind is Challenge:
            raise AuthenticationFailed(
                "this worker has no secret: leave out --secret-file, or start the worker with it"
            )
        self._check_order(self.peer_side, kind)

    def _check_order(self, sender: Side, kind: type[Message]) -> None:
        if (self.state, sender, kind) in TRANSITIONS:
            return
        allowed = [k for (state, side, k) in TRANSITIONS if (state, side) == (self.state, sender)]
        if self.state is State.OPEN:
            allowed += CONVERSATION[self._role(), sender]
        names = ", ".join(sorted(k.__name__ for k in allowed)) or "nothing"
        role = f" for a {self._role().value}" if self.state is State.OPEN else ""
        when = f"while the link is {self.state.value}{role}; allowed: {names}"
        if sender is self.side:
            raise LocalProtocolError(f"this {sender.value} may not send {kind.__name__} {when}")
        raise RemoteProtocolError(f"the {sender.value} may not send {kind.__name__} {when}")

    def _follow(self, sender: Side, kind: type[Message]) -> None:
        """The only place that moves `state` along the table."""
        self.state = TRANSITIONS[self.state, sender, kind]
        if self.state is State.OPEN:
            self._may_send = CONVERSATION[self._role(), self.side]
            self._may_receive = CONVERSATION[self._role(), self.peer_side]
            self._reader.limits = self._limits
        elif self.state is State.CLOSED:
            self._close()

    def _close(self) -> None:
        self.state = State.CLOSED
        self._reader.forget()
        self._may_send = self._may_receive = frozenset()

    def _role(self) -> Role:
        assert self.hello is not None
        return self.hello.role

    # -- handshake -----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.side is not OPENER:
            return
        if self._secret is None:
            self._send_hello()
        else:
            self._send_challenge()

    def _step_on(self, frame: Frame) -> Frame | None:
        """A frame that moves the link on; returned unless it is settled here."""
        message = frame.message
        if isinstance(message, Hello):
            self.hello = message
        self._follow(self.peer_side, type(message))
        if isinstance(message, Challenge):
            self._nonces[self.peer_side] = message.nonce
            self._answer_challenge()
        elif isinstance(message, Proof):
            self._check(message.mac, auth.OPENER)
            self.send(ProofAccepted(mac=self._prove(auth.LISTENER)))
        elif isinstance(message, ProofAccepted):
            self._check(message.mac, auth.LISTENER)
            self._send_hello()
        else:
            return frame
        return None

    def _spend(self, num_bytes: int) -> None:
        """What is left of the handshake's bytes bounds the next frame; none has a payload."""
        self._handshake_bytes -= num_bytes
        self._reader.limits = Limits(max(0, self._handshake_bytes), 0)

    def _send_hello(self) -> None:
        assert self.hello is not None
        self.send(self.hello)

    def _send_challenge(self) -> None:
        nonce = self._nonces[self.side]
        assert nonce is not None
        self.send(Challenge(version=PROTOCOL_VERSION, nonce=nonce))

    def _answer_challenge(self) -> None:
        if self.side is LISTENER:
            self._send_challenge()
        else:
            self.send(Proof(mac=self._prove(auth.OPENER)))

    def _prove(self, prover: bytes) -> bytes:
        assert self._secret is not None
        return auth.prove(self._secret, prover, **self._both_nonces())

    def _check(self, mac: bytes, prover: bytes) -> None:
        assert self._secret is not None
        if not auth.holds(mac, self._secret, prover, **self._both_nonces()):
            raise AuthenticationFailed(
                "the secret of the two sides is not the same: pass the same --secret-file to both"
            )

    def _both_nonces(self) -> dict[str, bytes]:
        opener, listener = self._nonces[OPENER], self._nonces[LISTENER]
        assert opener is not None
        assert listener is not None
        return {"opener_nonce": opener, "listener_nonce": listener}
