from __future__ import annotations

import random
import tracemalloc
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import (
    FrameCorrupt,
    FrameTooLarge,
    LocalProtocolError,
    RemoteProtocolError,
    VersionMismatch,
)
from proto.framing import (
    CHECKSUM,
    FRAME_VERSION,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MIB,
    PAYLOAD_ALIGNMENT,
    Frame,
    FrameReader,
    Limits,
    encode_frame,
)
from proto.messages import MAX_SCORE_BYTES, MESSAGES, Goodbye, Ping, Step, StepDone
from tests.proto.wire_examples import EXAMPLES, KINDS, STEP, STEP_PAYLOAD, Example, messages

GOLDEN = Path(__file__).with_name("golden_frames.txt")

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def wire(example: Example) -> bytes:
    return b"".join(encode_frame(example.message, [example.payload], epoch=example.epoch))


def header(
    *,
    magic: bytes = MAGIC,
    version: int = FRAME_VERSION,
    tag: int = Step.TAG,
    reserved: int = 0,
    metadata_bytes: int = 10,
    payload_bytes: int = 0,
    checksum: int = 0,
) -> bytes:
    start = HEADER.pack(magic, version, tag, reserved, 0, metadata_bytes, payload_bytes, checksum)
    return start + CHECKSUM.pack(crc32(start))


def golden() -> dict[str, bytes]:
    lines = [line.split() for line in GOLDEN.read_text().splitlines() if line[:1].isalpha()]
    return {name: bytes.fromhex("".join(hexes)) for name, *hexes in lines}


def as_example(frame: Frame) -> Example:
    return Example(frame.message, frame.epoch, bytes(frame.payload))


# --- golden bytes ----------------------------------------------------------------------------


def test_there_are_golden_bytes_of_every_message_and_of_nothing_else():
    assert set(golden()) == {kind.__name__ for kind in MESSAGES.values()}


@every_kind
def test_a_message_is_written_as_its_golden_bytes(kind):
    written = wire(EXAMPLES[kind])
    parts = [written[:HEADER_BYTES].hex(), written[HEADER_BYTES:].hex()]
    assert written == golden()[kind.__name__], (
        f"the wire changed; if it is meant to, {GOLDEN.name} wants:\n"
        f"{kind.__name__} {' '.join(parts)}"
    )


@every_kind
def test_golden_bytes_are_read_as_their_message(kind):
    assert [as_example(frame) for frame in FrameReader().receive(golden()[kind.__name__])] == [
        EXAMPLES[kind]
    ]


def test_the_header_is_32_bytes_of_which_the_last_4_guard_the_others():
    data = wire(EXAMPLES[Step])
    assert HEADER_BYTES == 32
    assert data[:4] == b"CMBO"
    assert int.from_bytes(data[28:32], "big") == crc32(data[:28])
    assert int.from_bytes(data[24:28], "big") == crc32(data[32:])


# --- round trips -----------------------------------------------------------------------------


@given(
    sent=st.lists(
        st.tuples(messages(), st.integers(0, 2**32 - 1), st.binary(max_size=100)), max_size=5
    ),
    data=st.data(),
)
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sent, data):
    sent = [
        Example(message, epoch, payload if message.HAS_PAYLOAD else b"")
        for message, epoch, payload in sent
    ]
    stream = b"".join(map(wire, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader()
    got = [
        as_example(frame)
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in reader.receive(stream[start:stop])
    ]
    assert got == sent
    reader.receive_eof()


def test_a_stream_that_comes_byte_by_byte_is_read_all_the_same():
    reader = FrameReader()
    stream = b"".join(wire(EXAMPLES[kind]) for kind in KINDS)
    got = [frame for byte in stream for frame in reader.receive(bytes([byte]))]
    assert [frame.message for frame in got] == [EXAMPLES[kind].message for kind in KINDS]


def test_a_payload_in_several_buffers_arrives_as_one():
    numbers = memoryview(bytearray(STEP_PAYLOAD[:48])).cast("i")
    floats = memoryview(bytearray(STEP_PAYLOAD[48:])).cast("f", (3, 2))
    buffers = encode_frame(STEP, [numbers, b"", floats, bytearray()])
    [frame] = FrameReader().receive(b"".join(buffers))
    assert frame.payload == STEP_PAYLOAD


# --- memory ----------------------------------------------------------------------------------


def test_a_payload_lies_where_the_socket_wrote_it():
    """What is read goes into the reader's own buffer, and the frame shows that same memory."""
    reader = FrameReader()
    data = wire(EXAMPLES[Step])
    space = reader.get_buffer()
    assert len(space) == HEADER_BYTES
    space[:] = data[:HEADER_BYTES]
    assert reader.advance(HEADER_BYTES) is None
    body = reader.get_buffer()
    assert len(body) == len(data) - HEADER_BYTES
    body[:] = data[HEADER_BYTES:]
    frame = reader.advance(len(body))
    assert frame is not None
    assert frame.payload == STEP_PAYLOAD
    body[-1] ^= 0xFF
    assert frame.payload[-1] == STEP_PAYLOAD[-1] ^ 0xFF


def test_a_payload_stays_as_it_is_while_later_frames_come():
    reader = FrameReader()
    [first] = reader.receive(wire(EXAMPLES[Step]))
    reader.receive(wire(Example(STEP, 0, bytes(100))))
    assert first.payload == STEP_PAYLOAD
    assert not first.payload.readonly


@given(message=messages([Step]))
def test_a_payload_begins_at_an_aligned_place_of_its_buffer(message):
    [frame] = FrameReader().receive(wire(Example(message, 0, b"12345678")))
    assert (len(frame.payload.obj) - len(frame.payload)) % PAYLOAD_ALIGNMENT == 0


@pytest.mark.parametrize("part", ["metadata", "payload"])
def test_a_frame_over_the_limit_is_refused_before_anything_is_allocated(part):
    announced = {"metadata": 2**32 - 1, "payload": 2**64 - 1}[part]
    reader = FrameReader()
    tracemalloc.start()
    try:
        with pytest.raises(FrameTooLarge) as caught:
            reader.receive(header(**{f"{part}_bytes": announced}))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (caught.value.part, caught.value.announced_bytes) == (part, announced)
    assert peak_bytes < MIB


@pytest.mark.parametrize(("part", "limit"), [("metadata", 64), ("payload", 1000)])
def test_the_limit_itself_is_accepted_and_one_more_is_not(part, limit):
    limits = Limits(metadata_bytes=64, payload_bytes=1000)
    FrameReader(limits).receive(header(**{f"{part}_bytes": limit}))
    with pytest.raises(FrameTooLarge, match=f"{limit + 1} bytes of {part}.*accepts {limit}"):
        FrameReader(limits).receive(header(**{f"{part}_bytes": limit + 1}))


def test_the_payload_of_an_answer_has_a_limit_of_its_own():
    FrameReader().receive(header(tag=StepDone.TAG, payload_bytes=MAX_SCORE_BYTES))
    with pytest.raises(FrameTooLarge, match=f"accepts {MAX_SCORE_BYTES}"):
        FrameReader().receive(header(tag=StepDone.TAG, payload_bytes=MAX_SCORE_BYTES + 1))
    done = EXAMPLES[StepDone].message
    with pytest.raises(LocalProtocolError, match=f"and {MAX_SCORE_BYTES}$"):
        encode_frame(done, [bytes(MAX_SCORE_BYTES + 1)])


# --- damage ----------------------------------------------------------------------------------


@every_kind
def test_a_frame_that_ends_early_anywhere_is_an_error_and_never_a_frame(kind):
    data = wire(EXAMPLES[kind])
    for length in range(1, len(data)):
        reader = FrameReader()
        assert reader.receive(data[:length]) == []
        assert reader.mid_frame
        with pytest.raises(RemoteProtocolError, match="ended inside"):
            reader.receive_eof()


@every_kind
def test_any_byte_that_changes_anywhere_is_found_with_the_bytes_at_hand(kind):
    """No flip makes the reader wait for bytes that never come, nor hand out a wrong frame."""
    data = wire(EXAMPLES[kind])
    rng = random.Random(kind.TAG)
    for place in range(len(data)):
        flips = {1 << rng.randrange(8), 0xFF, rng.randrange(1, 256), 0x80, 0x01}
        for flip in flips:
            damaged = bytearray(data)
            damaged[place] ^= flip
            with pytest.raises(FrameCorrupt):
                FrameReader().receive(damaged)


@every_kind
def test_damage_allocates_no_more_than_the_frame_itself(kind):
    data = wire(EXAMPLES[kind])
    tracemalloc.start()
    try:
        for place in range(HEADER_BYTES):
            with pytest.raises(FrameCorrupt):
                FrameReader().receive(
                    data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
                )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < MIB


@given(data=st.binary(min_size=HEADER_BYTES, max_size=300))
def test_bytes_of_another_protocol_are_an_error(data):
    with pytest.raises(RemoteProtocolError):
        FrameReader().receive(b"\x00" + data)


@pytest.mark.parametrize("start", [b"H", b"CMX", b"SSH-2.0-OpenSSH", b"-ERR\r\n"])
def test_another_protocol_is_noticed_by_its_first_wrong_byte(start):
    with pytest.raises(FrameCorrupt, match="does not speak Comboio's protocol"):
        FrameReader().receive(start)


@given(tag=st.sampled_from(sorted(MESSAGES)), body=st.binary(max_size=200))
def test_a_frame_whose_checksums_hold_but_whose_body_is_noise_is_an_error(tag, body):
    noise = b"\xc1" + body  # 0xc1 is the one byte that msgpack never uses
    data = header(tag=tag, metadata_bytes=len(noise), checksum=crc32(noise)) + noise
    with pytest.raises(RemoteProtocolError, match=MESSAGES[tag].__name__):
        FrameReader().receive(data)


def test_a_frame_without_metadata_is_an_error_at_its_header():
    with pytest.raises(RemoteProtocolError, match="Ping"):
        FrameReader().receive(header(tag=Ping.TAG, metadata_bytes=0))


def test_an_unknown_type_is_an_error_at_its_header():
    with pytest.raises(RemoteProtocolError, match="type 99"):
        FrameReader().receive(header(tag=99))


def test_another_version_of_the_header_is_named():
    with pytest.raises(VersionMismatch, match=f"version {FRAME_VERSION}.*version 9"):
        FrameReader().receive(header(version=9))


def test_a_reserved_field_that_is_used_is_an_error():
    with pytest.raises(FrameCorrupt, match="reserved"):
        FrameReader().receive(header(reserved=1))


def test_a_payload_on_a_message_that_has_none_is_an_error_at_its_header():
    with pytest.raises(RemoteProtocolError, match="Ping announces a payload"):
        FrameReader().receive(header(tag=Ping.TAG, payload_bytes=1))


def test_what_may_not_come_now_is_refused_before_its_body_is_made_room_for():
    def admit(kind):
        raise RemoteProtocolError(f"no {kind.__name__} now")

    reader = FrameReader(admit=admit)
    with pytest.raises(RemoteProtocolError, match="no Step now"):
        reader.receive(header(payload_bytes=2**63))


# --- what we send ----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [-1, 2**32])
def test_an_epoch_that_does_not_fit_is_not_sent(epoch):
    with pytest.raises(LocalProtocolError, match=f"epoch {epoch}"):
        encode_frame(Ping(number=1), epoch=epoch)


def test_a_payload_is_not_sent_with_a_message_that_has_none():
    with pytest.raises(LocalProtocolError, match="Ping with a payload"):
        encode_frame(Ping(number=1), [b"x"])


def test_more_than_the_limit_is_not_sent():
    limits = Limits(metadata_bytes=20, payload_bytes=10)
    with pytest.raises(LocalProtocolError, match="limits are 20 and 10"):
        encode_frame(Goodbye(reason="x" * 30), limits=limits)
    with pytest.raises(LocalProtocolError, match="limits are 20 and 10"):
        encode_frame(STEP, [bytes(11)], limits=limits)
