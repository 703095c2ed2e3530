"""Peers that lie, repeat, dribble, fall silent or never read, over real sockets with and without
certificates: each is refused or cut, and costs no more than its bound."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from proto import link as links
from proto.errors import AuthenticationFailed, Error, RemoteProtocolError, WorkerLost
from proto.framing import HEADER, HEADER_BYTES, MIB, FrameReader, encode_frame
from proto.link import MAX_UNPROVEN, LinkSettings
from proto.link_settings import LISTENER_SETTINGS
from proto.messages import (
    MAX_ADAPTERS,
    PROTOCOL_VERSION,
    AdapterFacts,
    Adapters,
    AdaptersRequest,
    Challenge,
    Goodbye,
    Ping,
    Pong,
    Proof,
    ProofAccepted,
    Refused,
    Step,
)
from proto.session import LISTENER_HANDSHAKE_BYTES
from tests.fuzz.raw_peer import announcing
from tests.proto.sockets import as_manager, listening, soon, stranger_at
from tests.proto.wire_examples import HELLO
from tests.support.certificates import tls_of_here

SECRET = b"correct horse battery staple"
FACTS = AdapterFacts(
    name="a" * 64, path="/" + "p" * 1000, fingerprint="f" * 32, num_bytes=0, num_modules=0, leases=0
)
LONG_ANSWER = Adapters(adapters=[FACTS] * MAX_ADAPTERS)  # 144 KiB


@pytest.fixture(params=["plain", "tls"])
def tls(request):
    return tls_of_here() if request.param == "tls" else None


@asynccontextmanager
async def stream_to(address, tls=None):
    """A connection to say what one likes on; with certificates, good ones."""
    host, port = address.rsplit(":", 1)
    more = {} if tls is None else {"ssl": tls.opener, "server_hostname": host}
    reader, writer = await soon(asyncio.open_connection(host, int(port), **more))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def frame(message) -> bytes:
    return b"".join(encode_frame(message))


async def next_frame(reader):
    header = await soon(reader.readexactly(HEADER_BYTES))
    *_, metadata, payload, _ = HEADER.unpack_from(header)
    [found] = FrameReader().receive(header + await soon(reader.readexactly(metadata + payload)))
    return found.message


# --- who does not know the secret ----------------------------------------------------------------


async def test_an_opener_that_hears_its_own_words_is_not_fooled():
    async def echo(reader, writer):
        while data := await reader.read(4096):
            writer.write(data)

    async with stranger_at(echo) as address:
        with pytest.raises((AuthenticationFailed, RemoteProtocolError)) as caught:
            await as_manager(address, secret=SECRET)
    assert address in str(caught.value)


async def test_an_opener_s_own_proof_proves_nothing_to_it():
    async def reflect(reader, writer):
        challenge = await next_frame(reader)
        writer.write(frame(challenge))
        proof = await next_frame(reader)
        writer.write(frame(ProofAccepted(mac=proof.mac)))

    async with stranger_at(reflect) as address:
        with pytest.raises(AuthenticationFailed, match="not the same"):
            await as_manager(address, secret=SECRET)


async def test_a_listener_that_hears_its_own_challenge_lets_nobody_in():
    async with (
        listening(secret=SECRET) as (listener, accepted, refused),
        stream_to(listener.address) as (reader, writer),
    ):
        writer.write(frame(Challenge(version=PROTOCOL_VERSION, nonce=bytes(32))))
        writer.write(frame(await next_frame(reader)))
        assert isinstance(await next_frame(reader), Refused)
        assert "allowed: Proof" in str(await soon(refused.get()))
        assert accepted.empty()


async def test_one_listener_does_not_help_to_open_another_of_the_same_secret():
    """It says nothing that proves anything before its peer has."""
    async with (
        listening(secret=SECRET) as (one, _, _),
        listening(secret=SECRET) as (two, accepted, refused),
        stream_to(one.address) as (reader_one, writer_one),
        stream_to(two.address) as (reader_two, writer_two),
    ):
        writer_two.write(frame(Challenge(version=PROTOCOL_VERSION, nonce=bytes(32))))
        nonce = (await next_frame(reader_two)).nonce
        writer_one.write(frame(Challenge(version=PROTOCOL_VERSION, nonce=nonce)))
        from_one = await next_frame(reader_one)
        assert isinstance(from_one, Challenge)
        writer_two.write(frame(Proof(mac=from_one.nonce)))
        assert isinstance(await next_frame(reader_two), Refused)
        assert isinstance(await soon(refused.get()), AuthenticationFailed)
        assert accepted.empty()


async def test_a_recorded_handshake_opens_nothing_on_either_side(tls):
    said, heard = bytearray(), bytearray()

    async def relay(reader, writer):
        host, port = listener.address.rsplit(":", 1)
        down, up = await asyncio.open_connection(host, int(port))

        async def copy(source, sink, record):
            while data := await source.read(4096):
                record += data
                sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, up, said), copy(down, writer, heard))

    async def play_back(reader, writer):
        writer.write(bytes(heard))
        await reader.read()

    async with listening(tls, secret=SECRET) as (listener, accepted, refused):
        async with stranger_at(relay) as address:
            link = await as_manager(address, secret=SECRET, tls=tls)
            await soon(link.close())
        await soon(accepted.get())
        async with stream_to(listener.address) as (reader, writer):
            writer.write(bytes(said))
            await soon(reader.read())
        assert isinstance(await soon(refused.get()), (AuthenticationFailed, RemoteProtocolError))
        assert accepted.empty()
    async with stranger_at(play_back) as address:
        with pytest.raises(Error) as caught:
            await as_manager(address, secret=SECRET, tls=tls)
        assert isinstance(caught.value, (AuthenticationFailed, RemoteProtocolError))


# --- strangers that take their time --------------------------------------------------------------


def test_what_a_stranger_may_cost_is_what_the_documents_say():
    assert LISTENER_HANDSHAKE_BYTES == 4 * 1024
    assert LISTENER_SETTINGS.handshake_timeout_s == 5
    assert MAX_UNPROVEN == 32


@pytest.mark.parametrize("start", [b"", b"\x16\x03\x01\x02\x00"], ids=["plain", "tls"])
async def test_a_stranger_that_sends_a_byte_now_and_then_gets_no_more_time(start):
    """Each is in order, and none puts off the end."""
    tls = tls_of_here() if start else None
    words = iter(start + bytes(2000) if start else frame(HELLO))
    settings = LinkSettings(handshake_timeout_s=0.4)
    async with (
        listening(tls, settings=settings) as (listener, _, refused),
        stream_to(listener.address) as (_, writer),
    ):
        while refused.empty():
            if (word := next(words, None)) is not None and not writer.is_closing():
                writer.write(bytes([word]))
            await asyncio.sleep(0.02)
        assert "did not finish the handshake within 0.4 s" in str(await refused.get())
        assert not listener.unproven


async def test_a_stranger_that_never_stops_is_read_for_a_few_kib_only():
    async with (
        listening(secret=SECRET) as (listener, _, refused),
        stream_to(listener.address) as (reader, writer),
    ):
        writer.write(frame(Challenge(version=PROTOCOL_VERSION, nonce=bytes(32))))
        assert isinstance(await next_frame(reader), Challenge)
        [link] = listener._unproven
        writer.write(announcing(Proof.TAG, 2**31, 0) + bytes(4 * MIB))
        assert "this link accepts" in str(await soon(refused.get()))
        await soon(link.wait_closed())
        # As much again may come while the refusal is on its way, and is forgotten.
        assert link.received_bytes <= 3 * LISTENER_HANDSHAKE_BYTES


# --- peers that know the secret ------------------------------------------------------------------


async def test_a_peer_that_asks_and_never_reads_costs_a_bounded_buffer_and_is_cut(tls):
    bound = 1 * MIB
    settings = LinkSettings(max_unsent_bytes=bound, missed_heartbeats=1000)
    most = 0

    def answer(_frame):
        nonlocal most
        link.send(LONG_ANSWER)
        most = max(most, link.unsent_bytes)

    async with listening(tls, settings=settings) as (listener, accepted, _):
        async with stream_to(listener.address, tls) as (_, writer):
            writer.write(frame(HELLO))
            link = await soon(accepted.get())
            closed = asyncio.get_running_loop().create_future()
            link.on_closed, link.on_frame = closed.set_result, answer
            writer.transport.pause_reading()
            while not closed.done():
                writer.write(frame(AdaptersRequest()))
                await asyncio.sleep(0)
            assert "it does not read" in str(closed.result())
            assert most <= bound + 64 * 1024  # what TLS adds


async def test_a_peer_that_falls_silent_is_cut(tls):
    """As one whose machine lost its power: its socket stays open and says nothing more."""
    settings = LinkSettings(heartbeat_s=0.02, missed_heartbeats=5)
    async with (
        listening(tls, settings=settings) as (listener, accepted, _),
        stream_to(listener.address, tls) as (_, writer),
    ):
        writer.write(frame(HELLO))
        link = await soon(accepted.get())
        await soon(link.wait_closed())
        assert "no answer for 0.1 s" in str(link.error)
        assert listener.links == frozenset()


async def test_a_peer_that_only_shuts_its_side_is_gone():
    async with (
        listening() as (listener, accepted, _),
        stream_to(listener.address) as (_, writer),
    ):
        writer.write(frame(HELLO))
        link = await soon(accepted.get())
        writer.write_eof()
        await soon(link.wait_closed())
        assert "without a goodbye" in str(link.error)


async def test_a_frame_that_never_ends_keeps_a_peer_no_longer_than_silence(tls):
    settings = LinkSettings(heartbeat_s=0.02, missed_heartbeats=5)
    async with (
        listening(tls, settings=settings) as (listener, accepted, _),
        stream_to(listener.address, tls) as (_, writer),
    ):
        writer.write(frame(HELLO))
        link = await soon(accepted.get())
        writer.write(announcing(Step.TAG, 100, 10 * MIB) + bytes(500))
        await soon(link.wait_closed())
        assert isinstance(link.error, Error)
        assert listener._room.taken_bytes == 0


async def test_frames_of_many_peers_share_one_room(monkeypatch, tls):
    monkeypatch.setattr(links, "MAX_COMING_BYTES", 5 * MIB)
    async with listening(tls) as (listener, accepted, _):
        async with stream_to(listener.address, tls) as (_, greedy):
            greedy.write(frame(HELLO))
            first = await soon(accepted.get())
            greedy.write(announcing(Step.TAG, 0, 4 * MIB))
            while not listener._room.taken_bytes:
                await soon(asyncio.sleep(0))
            async with stream_to(listener.address, tls) as (reader, writer):
                writer.write(frame(HELLO) + announcing(Step.TAG, 0, 2 * MIB))
                said = [await next_frame(reader)]
                while not isinstance(said[-1], Goodbye):
                    said.append(await next_frame(reader))
                assert "a frame of 2097152 bytes does not fit" in said[-1].reason
            async with stream_to(listener.address, tls) as (reader, writer):
                writer.write(frame(HELLO) + frame(Ping(number=77)))
                while not isinstance(await next_frame(reader), Pong):
                    pass  # small frames go on
        await soon(first.wait_closed())
        assert listener._room.taken_bytes == 0


async def test_a_manager_that_was_paused_for_a_moment_is_not_cut():
    """A bound on what waits is not one on how long a peer may think."""
    async with listening(settings=LISTENER_SETTINGS) as (listener, accepted, _):
        link = await as_manager(listener.address)
        there = await soon(accepted.get())
        link.pause_reading()
        for _ in range(20):
            there.send(LONG_ANSWER)
        link.resume_reading()
        for _ in range(20):
            assert (await soon(link.receive())).message == LONG_ANSWER
        await soon(link.close())


async def test_an_address_that_no_resolver_takes_is_said_so():
    for host in ("..", "x" * 64, "a\0b"):
        with pytest.raises(WorkerLost, match=r"\(the name cannot be resolved\)"):
            await as_manager(f"{host}:7710")
