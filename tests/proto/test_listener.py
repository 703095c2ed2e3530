"""Opening links over real sockets: refusals, strangers, silence, damage, addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from zlib import crc32

import msgspec
import pytest

import proto.link
from proto.errors import (
    AuthenticationFailed,
    Error,
    FrameCorrupt,
    FrameTooLarge,
    LocalProtocolError,
    PeerLost,
    RemoteProtocolError,
    UsageError,
    VersionMismatch,
    WorkerLost,
    WorkerRefused,
    WorkerUnreachable,
)
from proto.framing import CHECKSUM, HEADER, FrameReader, encode_frame
from proto.link import Link, LinkSettings, connect, listen
from proto.messages import (
    PROTOCOL_VERSION,
    Goodbye,
    Hello,
    Message,
    Ping,
    Refused,
    Role,
    Status,
    StatusRequest,
    Welcome,
)
from proto.session import LISTENER, LISTENER_HANDSHAKE_BYTES, Session, State
from tests.proto.sockets import stranger_at
from tests.proto.wire_examples import EXAMPLES, HELLO, STEP, STEP_PAYLOAD, WELCOME

SECRET = b"correct horse battery staple"
STATUS = EXAMPLES[Status].message
PING_BYTES = len(b"".join(encode_frame(Ping(number=0))))


async def soon(awaitable):
    """A deadline against a test that hangs, far beyond what is waited for."""
    return await asyncio.wait_for(awaitable, 20)


class Worker:
    """A listener that keeps what happened to it."""

    def __init__(self) -> None:
        self.links = asyncio.Queue()
        self.refused = asyncio.Queue()

    @asynccontextmanager
    async def listening(self, address="127.0.0.1:0", welcome=lambda hello: WELCOME, **options):
        listener = await listen(
            address,
            welcome=welcome,
            on_link=self.links.put_nowait,
            on_refused=lambda peer, error: self.refused.put_nowait((peer, error)),
            **options,
        )
        try:
            yield listener
        finally:
            await soon(listener.close())


@pytest.fixture
def worker():
    return Worker()


def as_manager(address: str, **options):
    return soon(connect(address, role=Role.MANAGER, agent="test", **options))


class Stranger:
    """A peer without a session: sends bytes as it likes and reads frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *messages: Message) -> None:
        self.writer.write(b"".join(b"".join(encode_frame(message)) for message in messages))

    async def next_ping(self) -> None:
        """Wait for one Ping and nothing else."""
        [frame] = FrameReader().receive(await soon(self.reader.readexactly(PING_BYTES)))
        assert isinstance(frame.message, Ping)

    async def everything(self) -> list[Message]:
        """All that the other side says until it closes."""
        data = await soon(self.reader.read())
        return [frame.message for frame in FrameReader().receive(data)]


@asynccontextmanager
async def stranger_to(address: str) -> AsyncIterator[Stranger]:
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Stranger(reader, writer)
    finally:
        writer.close()


@asynccontextmanager
async def strange_worker(play) -> AsyncIterator[str]:
    """A server that answers every connection with `play(stranger)`; its address."""
    async with stranger_at(lambda reader, writer: play(Stranger(reader, writer))) as address:
        yield address


async def play_handshake(stranger: Stranger) -> Session:
    """Let the peer in as a worker would, and nothing more."""
    session = Session(LISTENER)
    while session.state is State.UNGREETED:
        session.receive(await stranger.reader.read(4096))
    session.send(WELCOME)
    stranger.writer.writelines(session.outgoing())
    return session


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])
async def test_a_link_opens_and_closes(worker, secret):
    async with worker.listening(secret=secret) as listener:
        link = await as_manager(listener.address, secret=secret)
        accepted = await soon(worker.links.get())
        assert link.welcome == WELCOME
        assert link.peer == listener.address
        assert listener.links == {accepted}
        link.send(StatusRequest())
        assert (await soon(accepted.receive())).message == StatusRequest()
        await soon(link.close())
        await soon(accepted.wait_closed())
        assert listener.links == frozenset()
    assert worker.refused.empty()


async def test_the_socket_sends_at_once_and_notices_dead_hosts(worker):
    async with worker.listening() as listener:
        link = await as_manager(listener.address)
        accepted = await soon(worker.links.get())
        for end in (link, accepted):
            sock = end._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        await link.close()


async def test_a_neighbour_names_its_lease(worker):
    async with worker.listening() as listener:
        link = await soon(
            connect(listener.address, role=Role.NEIGHBOUR, agent="test", lease=b"l" * 16)
        )
        assert (await soon(worker.links.get())).hello.lease == b"l" * 16
        await link.close()


async def test_a_worker_that_says_no_is_quoted_with_its_address(worker):
    def refuse(hello):
        raise UsageError("this worker has no such lease")

    async with worker.listening(welcome=refuse) as listener:
        with pytest.raises(WorkerRefused) as caught:
            await as_manager(listener.address)
        assert str(caught.value) == (
            f"worker {listener.address} refused: this worker has no such lease"
        )
        _, error = await soon(worker.refused.get())
        assert str(error) == "this worker has no such lease"


async def test_the_words_of_a_worker_cannot_play_with_the_terminal(worker):
    def refuse(hello):
        raise UsageError("no\n\x1b[2Jlease")

    async with worker.listening(welcome=refuse) as listener:
        with pytest.raises(WorkerRefused) as caught:
            await as_manager(listener.address)
    assert str(caught.value) == f"worker {listener.address} refused: no  [2Jlease"


async def test_a_welcome_that_cannot_be_sent_is_a_refusal_on_both_sides(worker):
    facts = msgspec.structs.replace(WELCOME.worker, model="x" * 300)
    unfit = Welcome(version=PROTOCOL_VERSION, agent="test", worker=facts)
    async with worker.listening(welcome=lambda _: unfit) as listener:
        with pytest.raises(WorkerRefused, match=r"cannot send Welcome.worker.model"):
            await as_manager(listener.address)
        _, error = await soon(worker.refused.get())
    assert isinstance(error, LocalProtocolError)


async def test_a_welcome_that_does_not_suit_is_told_to_the_worker(worker):
    def check(welcome):
        raise UsageError(f"worker holds {welcome.worker.model}, another model is wanted")

    async with worker.listening() as listener:
        with pytest.raises(UsageError, match="holds demo"):
            await as_manager(listener.address, check=check)
        accepted = await soon(worker.links.get())
        await soon(accepted.wait_closed())
        assert accepted.goodbye == "worker holds demo, another model is wanted"


async def test_closing_a_listener_says_goodbye_on_every_link(worker):
    async with worker.listening() as listener:
        links = [await as_manager(listener.address) for _ in range(3)]
        await soon(listener.close("the worker was told to stop"))
    for link in links:
        await soon(link.wait_closed())
        assert link.goodbye == "the worker was told to stop"
    with pytest.raises(WorkerUnreachable, match="connection refused"):
        await as_manager(listener.address)


# --- the secret ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "sentence"),
    [
        (SECRET, None, "this worker wants a secret: pass --secret-file"),
        (None, SECRET, "this worker has no secret: leave out --secret-file"),
        (SECRET, b"x" * 16, "pass the same --secret-file to both"),
    ],
    ids=["only-worker", "only-manager", "different"],
)
async def test_a_secret_that_does_not_agree_is_one_sentence_on_both_sides(
    worker, theirs, ours, sentence
):
    async with worker.listening(secret=theirs) as listener:
        with pytest.raises(
            WorkerRefused, match=rf"worker {listener.address} refused: .*{sentence}"
        ):
            await as_manager(listener.address, secret=ours)
        peer, error = await soon(worker.refused.get())
        assert isinstance(error, AuthenticationFailed)
        assert str(error).startswith(f"{peer}: ")
        assert sentence in str(error)
        assert worker.links.empty()


# --- strangers at the worker's door ----------------------------------------------------------


async def test_another_version_is_one_sentence_on_both_sides(worker):
    async with worker.listening() as listener, stranger_to(listener.address) as stranger:
        stranger.send(Hello(version=PROTOCOL_VERSION + 1, role=Role.MANAGER, agent="later"))
        [refusal] = await stranger.everything()
        peer, error = await soon(worker.refused.get())
    assert "version 1, the other side version 2: install the same release" in refusal.reason
    assert isinstance(error, VersionMismatch)
    assert peer in str(error)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 5000, b"C"], ids=["http", "0", "short"]
)
async def test_another_protocol_is_turned_away(worker, data):
    async with worker.listening() as listener, stranger_to(listener.address) as stranger:
        stranger.writer.write(data)
        stranger.writer.write_eof()
        await stranger.everything()
        _, error = await soon(worker.refused.get())
    assert isinstance(error, (FrameCorrupt, PeerLost))


async def test_a_stranger_cannot_make_a_worker_read_more_than_4_kib(worker):
    async with worker.listening() as listener, stranger_to(listener.address) as stranger:
        start = HEADER.pack(b"CMBO", 1, Hello.TAG, 0, 0, LISTENER_HANDSHAKE_BYTES, 0, 0)
        stranger.writer.write(start + CHECKSUM.pack(crc32(start)) + bytes(2000))
        [refusal] = await stranger.everything()
        _, error = await soon(worker.refused.get())
    assert isinstance(error, FrameTooLarge)
    assert "this link accepts" in refusal.reason


async def test_a_stranger_that_goes_on_talking_after_its_refusal_is_cut(worker):
    async with worker.listening() as listener, stranger_to(listener.address) as stranger:

        async def talk_on():
            while True:
                stranger.writer.write(b"\x00" * 100_000)
                await stranger.writer.drain()

        with pytest.raises(ConnectionError):
            await soon(talk_on())
        _, error = await soon(worker.refused.get())
    assert isinstance(error, FrameCorrupt)


async def test_a_stranger_that_says_nothing_is_sent_away_in_time(worker):
    settings = LinkSettings(handshake_timeout_s=0.05)
    async with (
        worker.listening(settings=settings) as listener,
        stranger_to(listener.address) as stranger,
    ):
        [refusal] = await stranger.everything()
        _, error = await soon(worker.refused.get())
    assert isinstance(refusal, Refused)
    assert "did not finish the handshake within 0.05 s" in str(error)


async def test_a_stranger_that_stops_inside_its_hello_is_sent_away_in_time(worker):
    settings = LinkSettings(handshake_timeout_s=0.1)
    async with (
        worker.listening(settings=settings) as listener,
        stranger_to(listener.address) as stranger,
    ):
        hello = b"".join(encode_frame(HELLO))
        stranger.writer.write(hello[:-1])
        await stranger.everything()
        _, error = await soon(worker.refused.get())
    assert "did not finish the handshake" in str(error)


async def test_only_so_many_strangers_may_stand_at_the_door(worker):
    async with worker.listening(max_unproven=2) as listener:
        async with stranger_to(listener.address), stranger_to(listener.address):
            with pytest.raises(WorkerRefused, match="too many links are being opened"):
                await as_manager(listener.address)
        while listener.unproven:
            await soon(asyncio.sleep(0))
        await (await as_manager(listener.address)).close()


async def test_only_so_many_links_are_taken(worker):
    async with worker.listening(max_links=1) as listener:
        first = await as_manager(listener.address)
        with pytest.raises(WorkerRefused, match="has 1 links: it takes no more"):
            await as_manager(listener.address)
        await first.close()


async def test_damage_on_an_open_link_closes_it_with_a_sentence_for_both(worker):
    async with worker.listening() as listener, stranger_to(listener.address) as stranger:
        stranger.send(HELLO)
        link = await soon(worker.links.get())
        closed = asyncio.get_running_loop().create_future()
        link.on_closed = closed.set_result
        damaged = bytearray(b"".join(encode_frame(STEP, [STEP_PAYLOAD])))
        damaged[-1] ^= 1
        stranger.writer.write(damaged)
        *_, goodbye = await stranger.everything()
        error = await soon(closed)
    assert isinstance(error, FrameCorrupt)
    assert str(error) == f"{link.peer}: the body of Step does not match its checksum"
    assert isinstance(goodbye, Goodbye)
    assert goodbye.reason == "the body of Step does not match its checksum"


async def test_an_end_inside_a_frame_is_a_lost_peer(worker):
    async with worker.listening() as listener:
        async with stranger_to(listener.address) as stranger:
            stranger.send(HELLO)
            link = await soon(worker.links.get())
            stranger.writer.write(b"".join(encode_frame(STEP, [STEP_PAYLOAD]))[:-1])
            stranger.writer.write_eof()
            with pytest.raises(PeerLost, match=r"without a goodbye .*ended inside Step"):
                await soon(link.receive())


async def test_closing_a_link_whose_peer_has_just_gone_is_no_error(worker):
    """Its kernel answers our goodbye with a reset before we shut our side of the connection."""
    async with worker.listening() as listener:
        host, port = listener.address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(b"".join(encode_frame(HELLO)))
            link = await soon(worker.links.get())
            said = len(b"".join(encode_frame(WELCOME))) + PING_BYTES
            await asyncio.to_thread(sock.recv, said, socket.MSG_WAITALL)
        link.close_soon()
        await soon(link.wait_closed())
        assert link.error is None


# --- strange workers -------------------------------------------------------------------------


async def test_a_worker_that_stops_answering_is_lost():
    settings = LinkSettings(heartbeat_s=0.02, missed_heartbeats=3)
    async with strange_worker(play_handshake) as address:
        link = await as_manager(address, settings=settings)
        with pytest.raises(WorkerLost) as caught:
            await soon(link.receive())
    assert str(caught.value) == f"worker {address} was lost: no answer for 0.06 s"


async def test_a_link_pings_by_itself_and_takes_any_byte_for_a_sign_of_life():
    """A large frame that comes slowly stands in front of the Pong: its bytes must do."""
    enough = asyncio.Event()

    async def answer_each_ping_with_one_byte(stranger):
        session = await play_handshake(stranger)
        session.send(STATUS)
        answer = iter(b"".join(session.outgoing()))
        for _ in range(8):
            await stranger.next_ping()
            stranger.writer.write(bytes([next(answer)]))
        enough.set()

    settings = LinkSettings(heartbeat_s=0.02, missed_heartbeats=2)
    async with strange_worker(answer_each_ping_with_one_byte) as address:
        link = await as_manager(address, settings=settings)
        await soon(enough.wait())
        assert link.is_open
        await link.close()


async def test_a_link_that_rests_goes_on_pinging_and_takes_nobody_for_dead():
    enough = asyncio.Event()

    async def count_pings(stranger):
        await play_handshake(stranger)
        for _ in range(8):
            await stranger.next_ping()
        enough.set()

    settings = LinkSettings(heartbeat_s=0.02, missed_heartbeats=2)
    async with strange_worker(count_pings) as address:
        link = await as_manager(address, settings=settings)
        link.pause_reading()
        await soon(enough.wait())
        assert link.is_open
        link.resume_reading()
        with pytest.raises(WorkerLost, match=r"no answer for 0.04 s"):
            await soon(link.receive())


async def test_a_ping_without_answer_raises_and_leaves_the_link():
    async with strange_worker(play_handshake) as address:
        link = await as_manager(address)
        with pytest.raises(WorkerLost, match=r"no answer to a ping within 0.01 s"):
            await link.ping(timeout_s=0.01)
        assert link.is_open
        await link.close()


async def test_a_worker_that_never_answers_the_hello_is_given_up():
    async def say_nothing(stranger):
        pass

    async with strange_worker(say_nothing) as address:
        with pytest.raises(WorkerLost, match=f"{address} was lost: it did not finish the hand"):
            await as_manager(address, timeout_s=0.5)


async def test_a_worker_of_another_version_is_named():
    async def other_version(stranger):
        stranger.send(Welcome(version=2, agent="later", worker=WELCOME.worker))

    async with strange_worker(other_version) as address:
        with pytest.raises(VersionMismatch, match=rf"{address}: .*version 1.*version 2"):
            await as_manager(address)


async def test_a_port_that_is_something_else_is_recognised():
    async def web_server(stranger):
        stranger.writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with strange_worker(web_server) as address:
        with pytest.raises(FrameCorrupt, match=rf"{address}: .*does not speak Comboio's protocol"):
            await as_manager(address)


async def test_a_worker_that_hangs_up_in_the_handshake_is_lost():
    async def hang_up(stranger):
        stranger.writer.close()

    async with strange_worker(hang_up) as address:
        with pytest.raises(WorkerLost, match=r"without a goodbye|connection broke"):
            await as_manager(address)


async def test_a_message_out_of_turn_is_refused_by_name():
    async def too_early(stranger):
        stranger.send(Ping(number=1))

    async with strange_worker(too_early) as address:
        with pytest.raises(RemoteProtocolError, match="Ping while the link is greeted"):
            await as_manager(address)


async def test_giving_up_a_connect_leaves_no_socket_behind():
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def watch(stranger):
        arrived.set()
        await stranger.reader.read()
        gone.set()

    async with strange_worker(watch) as address:
        connecting = asyncio.ensure_future(as_manager(address))
        await soon(arrived.wait())
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await soon(gone.wait())


async def test_a_connect_that_is_given_up_at_any_moment_leaves_no_timer_behind(worker, monkeypatch):
    made = []

    class Recorded(Link):
        def __init__(self, session, peer, settings, door=None):
            super().__init__(session, peer, settings, door)
            if door is None:
                made.append(self)

    async with worker.listening() as listener:
        monkeypatch.setattr(proto.link, "Link", Recorded)
        for moments in range(40):
            opening = connect(listener.address, role=Role.MANAGER, agent="test")
            connecting = asyncio.ensure_future(opening)
            for _ in range(moments):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            if not connecting.cancelled():
                await soon(connecting.result().close())
    assert any(link._transport is not None for link in made)
    assert all(link._ended for link in made)
    assert all(link._deadline is None or link._deadline.cancelled() for link in made)


# --- addresses -------------------------------------------------------------------------------


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]  # bound and not listening: connections are refused


async def test_no_worker_at_the_address_says_how_to_start_one(free_port):
    with pytest.raises(WorkerUnreachable) as caught:
        await as_manager(f"127.0.0.1:{free_port}")
    assert str(caught.value) == (
        f"no worker answers at 127.0.0.1:{free_port} (connection refused): "
        f"start one there with `worker --listen 127.0.0.1:{free_port} ...`, or check --workers"
    )


async def test_a_host_that_swallows_connections_is_given_up_in_time():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        with socket.create_connection(address):  # and nobody accepts: the queue is full
            with pytest.raises(WorkerUnreachable, match=r"no connection within 0.2 s"):
                await as_manager(f"127.0.0.1:{address[1]}", timeout_s=0.2)


async def test_a_name_that_does_not_resolve_is_said_so():
    with pytest.raises(WorkerUnreachable, match=r"no-such-host.invalid:7710 \(the name cannot be"):
        await as_manager("no-such-host.invalid:7710")
    with pytest.raises(UsageError, match=r"no-such-host.invalid:7710: the name cannot be resolved"):
        await listen("no-such-host.invalid:7710", welcome=lambda _: WELCOME, on_link=print)


@pytest.mark.parametrize("address", ["host", "host:port:1", "127.0.0.1:70000", "127.0.0.1:0"])
async def test_a_bad_address_is_the_callers_mistake(address):
    with pytest.raises(UsageError) as caught:
        await as_manager(address)
    assert repr(address) in str(caught.value)


async def test_a_port_in_use_says_the_way_out(worker):
    async with worker.listening() as listener:
        with pytest.raises(UsageError) as caught:
            await listen(listener.address, welcome=lambda _: WELCOME, on_link=print)
    assert str(caught.value) == (
        f"cannot listen on {listener.address}: the port is in use; stop the process that has it, "
        "or pass --listen HOST:PORT with another port (port 0 picks a free one)"
    )


async def test_an_address_of_another_machine_cannot_be_listened_on():
    with pytest.raises(UsageError, match=r"192.0.2.1:7710: this machine has no such address"):
        await listen("192.0.2.1:7710", welcome=lambda _: WELCOME, on_link=print)


async def test_a_name_is_bound_to_one_address_and_one_port(worker):
    async with worker.listening("localhost:0") as listener:
        host, port = listener.address.rsplit(":", 1)
        assert host == "127.0.0.1"
        await (await as_manager(f"localhost:{port}")).close()


async def test_ipv6_works_in_brackets(worker):
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError as exc:
        pytest.skip(f"this machine has no IPv6 loopback: {exc}")
    async with worker.listening("[::1]:0") as listener:
        assert listener.address.startswith("[::1]:")
        await (await as_manager(listener.address)).close()


def test_an_unreachable_worker_is_a_lost_worker_and_an_error_of_ours():
    assert issubclass(WorkerUnreachable, WorkerLost)
    assert issubclass(WorkerLost, PeerLost)
    assert issubclass(PeerLost, Error)
