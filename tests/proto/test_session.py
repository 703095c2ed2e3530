from __future__ import annotations

import itertools
from zlib import crc32

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import (
    AuthenticationFailed,
    FrameTooLarge,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    VersionMismatch,
)
from proto.framing import CHECKSUM, HEADER, Frame, FrameReader, Limits, encode_frame
from proto.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    Challenge,
    Goodbye,
    Hello,
    Lease,
    Leased,
    Message,
    Ping,
    Proof,
    ProofAccepted,
    Refused,
    Role,
    Step,
    Welcome,
)
from proto.session import (
    CONVERSATION,
    LISTENER,
    LISTENER_HANDSHAKE_BYTES,
    OPENER,
    OPENER_HANDSHAKE_BYTES,
    TRANSITIONS,
    Session,
    Side,
    State,
)
from tests.proto.wire_examples import EXAMPLES, STEP, STEP_PAYLOAD, WELCOME

SECRET = b"correct horse battery staple"
NONCES = {OPENER: b"o" * 32, LISTENER: b"l" * 32}


def session(side: Side, *, secret: bytes | None = None, role: Role = Role.MANAGER) -> Session:
    hello = Hello(version=PROTOCOL_VERSION, role=role, agent="test") if side is OPENER else None
    return Session(side, hello=hello, secret=secret, nonce=NONCES[side] if secret else None)


def said(sender: Session) -> list[Message]:
    """What a session wants written, as its peer would read it."""
    return [f.message for f in FrameReader().receive(b"".join(sender.outgoing()))]


def frame(message: Message) -> bytes:
    return b"".join(encode_frame(message, EXAMPLES[type(message)].payload and [b"1234"]))


def pass_on(sender: Session, receiver: Session) -> list[Frame]:
    return receiver.receive(b"".join(sender.outgoing()))


# Where each side waits for the other; through the states between it passes by itself.
WAITS = {
    OPENER: [State.CHALLENGED, State.PROVEN, State.GREETED, State.OPEN],
    LISTENER: [State.UNPROVEN, State.ANSWERED, State.UNGREETED, State.GREETED, State.OPEN],
}


def waiting(side: Side, state: State, role: Role = Role.MANAGER) -> Session:
    """One end of a link that waits in `state`, with all it said taken away."""
    secret = None if state in (State.UNGREETED, State.GREETED, State.OPEN) else SECRET
    pair = {
        OPENER: session(OPENER, secret=secret, role=role),
        LISTENER: session(LISTENER, secret=secret),
    }
    for sender in itertools.cycle([OPENER, LISTENER]):
        if pair[side].state is state:
            break
        if pair[sender].state is State.GREETED and sender is LISTENER:
            pair[sender].send(WELCOME)
        pass_on(pair[sender], pair[LISTENER if sender is OPENER else OPENER])
    pair[side].outgoing()
    return pair[side]


def opened(role: Role = Role.MANAGER) -> tuple[Session, Session]:
    return waiting(OPENER, State.OPEN, role), waiting(LISTENER, State.OPEN, role)


# --- the whole way ---------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])
@pytest.mark.parametrize("role", Role)
def test_a_link_opens_when_both_sides_agree(secret, role):
    opener = session(OPENER, secret=secret, role=role)
    listener = session(LISTENER, secret=secret)
    if secret is not None:
        assert pass_on(opener, listener) == []
        assert pass_on(listener, opener) == []
        assert pass_on(opener, listener) == []
        assert pass_on(listener, opener) == []
    [hello] = pass_on(opener, listener)
    assert hello.message.role is role
    assert listener.hello == hello.message
    listener.send(WELCOME)
    [welcome] = pass_on(listener, opener)
    assert welcome.message == WELCOME
    assert (opener.state, listener.state) == (State.OPEN, State.OPEN)


def test_a_step_crosses_an_open_link_with_its_epoch_and_payload():
    opener, listener = opened()
    opener.send(STEP, STEP_PAYLOAD[:28], STEP_PAYLOAD[28:], epoch=9)
    [got] = pass_on(opener, listener)
    assert (got.message, got.epoch, got.payload) == (STEP, 9, STEP_PAYLOAD)


def test_send_says_how_many_bytes_it_made():
    opener, _ = opened()
    num_bytes = opener.send(STEP, STEP_PAYLOAD)
    assert num_bytes == sum(map(len, opener.outgoing()))


def test_a_refusal_of_a_lease_leaves_the_link_open():
    opener, listener = opened()
    listener.send(Refused(reason="only 3 of 8 blocks are free"))
    [answer] = pass_on(listener, opener)
    assert answer.message.reason == "only 3 of 8 blocks are free"
    assert opener.state is State.OPEN


def test_a_refusal_of_a_hello_closes_the_link():
    opener, listener = session(OPENER), session(LISTENER)
    pass_on(opener, listener)
    listener.send(Refused(reason="no such lease"))
    [answer] = pass_on(listener, opener)
    assert answer.message == Refused(reason="no such lease")
    assert (opener.state, listener.state) == (State.CLOSED, State.CLOSED)


@pytest.mark.parametrize("side", Side)
def test_either_side_ends_a_link_with_goodbye(side):
    leaver, other = opened() if side is OPENER else reversed(opened())
    leaver.send(Goodbye(reason="done"))
    [goodbye] = pass_on(leaver, other)
    assert goodbye.message.reason == "done"
    assert (leaver.state, other.state) == (State.CLOSED, State.CLOSED)
    other.receive_eof()
    leaver.receive_eof()


def test_goodbyes_that_cross_are_no_error():
    opener, listener = opened()
    opener.send(Ping(number=1))
    opener.send(Goodbye(reason="done"))
    listener.send(Goodbye(reason="done too"))
    assert pass_on(opener, listener) == []
    assert pass_on(listener, opener) == []


def test_nothing_is_said_after_goodbye():
    opener, _ = opened()
    opener.send(Goodbye(reason="done"))
    with pytest.raises(LocalProtocolError, match="Ping while the link is closed; allowed: nothing"):
        opener.send(Ping(number=1))


# --- the table -------------------------------------------------------------------------------


def allowed(state: State, role: Role, sender: Side) -> set[type[Message]]:
    kinds = {kind for (where, side, kind) in TRANSITIONS if (where, side) == (state, sender)}
    return kinds | (CONVERSATION[role, sender] if state is State.OPEN else set())


at_every_place = pytest.mark.parametrize(
    ("side", "state", "role"),
    [
        pytest.param(side, state, role, id=f"{side.value}-{state.value}-{role.value}")
        for side, states in WAITS.items()
        for state in states
        for role in (Role if state is State.OPEN else [Role.MANAGER])
    ],
)


@at_every_place
def test_what_the_table_does_not_allow_is_refused_by_name(side, state, role):
    sender = LISTENER if side is OPENER else OPENER
    for kind in set(MESSAGES.values()) - allowed(state, role, sender):
        receiver = waiting(side, state, role)
        with pytest.raises(ProtocolError) as caught:
            receiver.receive(frame(EXAMPLES[kind].message))
        assert receiver.state is State.CLOSED
        if isinstance(caught.value, RemoteProtocolError):
            names = ", ".join(sorted(k.__name__ for k in allowed(state, role, sender)))
            assert f"the {sender.value} may not send {kind.__name__}" in str(caught.value)
            assert f"while the link is {state.value}" in str(caught.value)
            assert str(caught.value).endswith(f"allowed: {names or 'nothing'}")
        else:
            assert isinstance(caught.value, AuthenticationFailed)  # a secret on one side only
            assert kind in (Hello, Challenge)


@at_every_place
def test_our_own_sends_keep_to_the_same_table(side, state, role):
    for kind in set(MESSAGES.values()) - allowed(state, role, side):
        own = waiting(side, state, role)
        with pytest.raises(LocalProtocolError, match=f"may not send {kind.__name__} while"):
            own.send(EXAMPLES[kind].message)
        assert own.state is state
        assert own.outgoing() == []


@pytest.mark.parametrize(
    ("role", "sender", "kind"),
    [
        (role, sender, kind)
        for (role, sender), kinds in CONVERSATION.items()
        for kind in sorted(kinds, key=lambda kind: kind.TAG)
    ],
    ids=lambda value: getattr(value, "value", None) or value.__name__,
)
def test_what_a_role_may_say_passes_and_leaves_the_link_open(role, sender, kind):
    own, other = opened(role) if sender is OPENER else reversed(opened(role))
    own.send(EXAMPLES[kind].message)
    assert [got.message for got in pass_on(own, other)] == [EXAMPLES[kind].message]
    assert (own.state, other.state) == (State.OPEN, State.OPEN)


def test_every_state_can_be_reached_and_left():
    reached = {State.UNPROVEN} | set(TRANSITIONS.values())
    left = {state for (state, _, _) in TRANSITIONS}
    assert reached == set(State)
    assert left == set(State) - {State.CLOSED}


def test_every_message_is_allowed_somewhere():
    in_tables = {kind for (_, _, kind) in TRANSITIONS} | frozenset().union(*CONVERSATION.values())
    assert in_tables == set(MESSAGES.values())


# --- refusals --------------------------------------------------------------------------------


def test_a_version_that_differs_is_one_sentence_on_both_sides():
    listener = session(LISTENER)
    stranger = Hello(version=PROTOCOL_VERSION + 1, role=Role.MANAGER, agent="later")
    with pytest.raises(VersionMismatch, match="version 1, the other side version 2"):
        listener.receive(frame(stranger))
    [refusal] = said(listener)
    assert "version 1, the other side version 2: install the same release" in refusal.reason


def test_a_welcome_of_another_version_is_refused_by_the_opener():
    opener = session(OPENER)
    data = frame(Welcome(version=PROTOCOL_VERSION + 1, agent="later", worker=WELCOME.worker))
    with pytest.raises(VersionMismatch):
        opener.receive(data)


def test_another_layout_of_frames_is_answered_with_a_refusal():
    listener = session(LISTENER)
    start = HEADER.pack(b"CMBO", 2, Hello.TAG, 0, 0, 5, 0, 0)
    with pytest.raises(VersionMismatch):
        listener.receive(start + CHECKSUM.pack(crc32(start)))
    assert [type(message) for message in said(listener)] == [Refused]


def test_an_error_on_an_open_link_is_told_to_the_peer_as_goodbye():
    opener, listener = opened()
    with pytest.raises(RemoteProtocolError):
        listener.receive(frame(Leased(lease=b"x" * 16, blocks=1)))
    [goodbye] = pass_on(listener, opener)
    assert "the opener may not send Leased" in goodbye.message.reason


def test_an_opener_that_gives_up_in_the_handshake_says_nothing_more():
    opener = session(OPENER)
    opener.outgoing()
    with pytest.raises(RemoteProtocolError):
        opener.receive(frame(Goodbye(reason="?")))
    assert opener.outgoing() == []
    assert opener.state is State.CLOSED


def test_a_reason_that_is_no_unicode_text_is_said_as_well_as_it_can_be():
    opener, listener = opened()
    opener.give_up("cannot read caf\udce9.txt")
    [goodbye] = pass_on(opener, listener)
    assert goodbye.message.reason == "cannot read caf?.txt"


def test_a_long_reason_is_cut_to_what_a_peer_accepts():
    opener, listener = opened()
    opener.give_up("x" * 10_000)
    [goodbye] = pass_on(opener, listener)
    assert len(goodbye.message.reason) == 4096


def test_an_end_without_goodbye_is_an_error_that_says_where():
    opener, listener = opened()
    with pytest.raises(RemoteProtocolError, match="the opener closed the link while it was open"):
        listener.receive_eof()
    opener.send(STEP, STEP_PAYLOAD)
    opener_bytes = b"".join(opener.outgoing())
    _, listener = opened()
    listener.receive(opener_bytes[:-1])
    with pytest.raises(RemoteProtocolError, match="ended inside Step"):
        listener.receive_eof()


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "limit", "kind"),
    [(LISTENER, LISTENER_HANDSHAKE_BYTES, Hello), (OPENER, OPENER_HANDSHAKE_BYTES, Welcome)],
    ids=["listener", "opener"],
)
def test_a_peer_gets_little_room_before_it_is_let_in(side, limit, kind):
    own = session(side)
    if side is LISTENER:
        with pytest.raises(FrameTooLarge):
            own.receive(oversized(kind, limit - 31))
    with pytest.raises(FrameTooLarge):
        session(side).receive(oversized(kind, limit + 1))


def oversized(kind: type[Message], metadata_bytes: int) -> bytes:
    start = HEADER.pack(b"CMBO", 1, kind.TAG, 0, 0, metadata_bytes, 0, 0)
    return start + CHECKSUM.pack(crc32(start))


def test_the_room_of_a_handshake_is_for_all_its_frames_together():
    listener = session(LISTENER, secret=SECRET)
    listener.receive(frame(Challenge(version=PROTOCOL_VERSION, nonce=NONCES[OPENER])))
    left = LISTENER_HANDSHAKE_BYTES - len(frame(EXAMPLES[Challenge].message)) - 32
    with pytest.raises(FrameTooLarge, match=f"accepts {left}"):
        listener.receive(oversized(Proof, 4000))


def test_the_longest_hello_and_welcome_fit_into_the_handshake():
    name = "\N{GRINNING FACE}" * 256
    texts = dict.fromkeys(("listen", "host", "model", "fingerprint", "dtype", "device"), name)
    facts = msgspec.structs.replace(WELCOME.worker, model_path="\N{GRINNING FACE}" * 4096, **texts)
    hello = Hello(version=PROTOCOL_VERSION, role=Role.NEIGHBOUR, agent=name, lease=b"x" * 16)
    opener = Session(OPENER, hello=hello, secret=SECRET, nonce=NONCES[OPENER])
    listener = session(LISTENER, secret=SECRET)
    for _ in range(2):
        pass_on(opener, listener)
        pass_on(listener, opener)
    pass_on(opener, listener)
    listener.send(Welcome(version=PROTOCOL_VERSION, agent=name, worker=facts))
    pass_on(listener, opener)
    assert opener.state is State.OPEN


def test_the_payload_limit_holds_on_an_open_link():
    limits = Limits(payload_bytes=100)
    opener = session(OPENER)
    listener = Session(LISTENER, limits=limits)
    pass_on(opener, listener)
    listener.send(WELCOME)
    pass_on(listener, opener)
    opener.send(STEP, bytes(101))
    with pytest.raises(FrameTooLarge, match="101 bytes of payload, this link accepts 100"):
        pass_on(opener, listener)


# --- the secret ------------------------------------------------------------------------------


def test_nobody_without_the_secret_is_let_in():
    opener, listener = session(OPENER, secret=b"x" * 16), session(LISTENER, secret=SECRET)
    pass_on(opener, listener)
    pass_on(listener, opener)
    with pytest.raises(AuthenticationFailed, match="not the same"):
        pass_on(opener, listener)
    [refusal] = pass_on(listener, opener)
    assert "pass the same --secret-file to both" in refusal.message.reason


def test_a_listener_that_does_not_know_the_secret_is_found_out():
    opener, impostor = session(OPENER, secret=SECRET), session(LISTENER, secret=b"x" * 16)
    pass_on(opener, impostor)
    pass_on(impostor, opener)
    assert [type(message) for message in said(opener)] == [Proof]
    with pytest.raises(AuthenticationFailed):
        opener.receive(frame(ProofAccepted(mac=b"m" * 32)))
    assert said(opener) == []


def test_a_proof_sent_back_to_its_maker_proves_nothing():
    opener = session(OPENER, secret=SECRET)
    [challenge] = said(opener)
    opener.receive(frame(challenge))
    [proof] = said(opener)
    with pytest.raises(AuthenticationFailed):
        opener.receive(frame(ProofAccepted(mac=proof.mac)))


def test_a_whole_exchange_played_again_opens_nothing():
    opener, listener = session(OPENER, secret=SECRET), session(LISTENER, secret=SECRET)
    recorded = []
    for _ in range(2):
        recorded.append(b"".join(opener.outgoing()))
        listener.receive(recorded[-1])
        pass_on(listener, opener)
    assert listener.state is State.UNGREETED
    fresh = Session(LISTENER, secret=SECRET, nonce=b"f" * 32)
    fresh.receive(recorded[0])
    with pytest.raises(AuthenticationFailed):
        fresh.receive(recorded[1])


def test_a_secret_on_the_listener_alone_is_said_on_both_sides():
    opener, listener = session(OPENER), session(LISTENER, secret=SECRET)
    with pytest.raises(AuthenticationFailed, match="wants a secret: pass --secret-file"):
        pass_on(opener, listener)
    [refusal] = pass_on(listener, opener)
    assert "this worker wants a secret: pass --secret-file" in refusal.message.reason


def test_a_secret_on_the_opener_alone_is_said_on_both_sides():
    opener, listener = session(OPENER, secret=SECRET), session(LISTENER)
    with pytest.raises(AuthenticationFailed, match="has no secret: leave out --secret-file"):
        pass_on(opener, listener)
    [refusal] = pass_on(listener, opener)
    assert "this worker has no secret" in refusal.message.reason


@given(body=st.binary(max_size=100))
def test_without_the_proof_a_hello_is_not_even_parsed(body):
    """The refusal comes at the header: what the body holds makes no difference."""
    listener = session(LISTENER, secret=SECRET)
    with pytest.raises(AuthenticationFailed, match="wants a secret"):
        listener.receive(oversized(Hello, len(body)) + body)


@pytest.mark.parametrize("kind", [Step, Lease, Ping, Hello])
def test_with_a_challenge_on_its_way_only_the_proof_may_come(kind):
    listener = session(LISTENER, secret=SECRET)
    listener.receive(frame(Challenge(version=PROTOCOL_VERSION, nonce=NONCES[OPENER])))
    with pytest.raises(RemoteProtocolError, match="allowed: Proof"):
        listener.receive(oversized(kind, 10))
