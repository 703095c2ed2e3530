from __future__ import annotations

import re
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.codec import (
    decode,
    encode,
    kind_of,
    pack_step_tables,
    score_bytes,
    step_layout,
    step_payload,
    step_scores,
)
from proto.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch
from proto.messages import (
    MAX_REASON_CHARS,
    MAX_SCORE_BYTES,
    MESSAGES,
    PROTOCOL_VERSION,
    Fault,
    Goodbye,
    Hello,
    Lease,
    Message,
    Ping,
    Run,
    Sampling,
    Scored,
    Step,
    StepDone,
)
from tests.proto.wire_examples import (
    EXAMPLES,
    KINDS,
    LEASE,
    STEP,
    STEP_PAYLOAD,
    fields_of,
    messages,
)

pack = msgspec.msgpack.encode
GOOD_RUN = [1, 0, 1, 0, 0]


@given(message=messages())
def test_any_message_comes_back_as_it_went(message):
    assert decode(message.TAG, encode(message)) == message


@given(tag=st.sampled_from(sorted(MESSAGES)), metadata=st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_typed_error(tag, metadata):
    try:
        assert isinstance(decode(tag, metadata), Message)
    except RemoteProtocolError:
        pass


@given(message=messages(), data=st.data())
def test_metadata_cut_anywhere_is_refused(message, data):
    metadata = encode(message)
    cut = data.draw(st.integers(0, len(metadata) - 1))
    with pytest.raises(RemoteProtocolError):
        decode(message.TAG, metadata[:cut])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_surplus_field_is_refused(kind):
    fields = [*fields_of(EXAMPLES[kind].message), 1]
    with pytest.raises(RemoteProtocolError, match=f"cannot read {kind.__name__}: .*at most length"):
        decode(kind.TAG, pack(fields))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bytes_after_the_last_field_are_refused(kind):
    with pytest.raises(RemoteProtocolError, match="trailing"):
        decode(kind.TAG, encode(EXAMPLES[kind].message) + b"\x00")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_map_in_place_of_the_fields_is_refused(kind):
    with pytest.raises(RemoteProtocolError, match="array"):
        decode(kind.TAG, pack({"reason": "x"}))


@pytest.mark.parametrize("tag", [0, 7, 35, 255])
def test_an_unknown_type_is_refused_with_its_number(tag):
    with pytest.raises(RemoteProtocolError, match=f"type {tag}"):
        kind_of(tag)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ([LEASE, 1, [GOOD_RUN, [1, -2, 1, 0, 0]]], "Step.runs[1].start: expected `int` >= 0"),
        ([LEASE, 1, [[1, 0, 0, 0, 0]]], "Step.runs[0].num_tokens: expected `int` >= 1"),
        ([LEASE, 1, [[*GOOD_RUN, [0, 0, 5e9]]]], "sampling.temperature: expected `float` <= 1000"),
        ([LEASE, 1, [[*GOOD_RUN, [0, 0, 0, 0, 0]]]], "sampling.top_p: expected `float` > 0"),
        ([LEASE, 2**60, [GOOD_RUN]], "Step.step: expected `int` <="),
        ([LEASE[:15], 1, [GOOD_RUN]], "Step.lease: expected `bytes` of length >= 16"),
        ([LEASE, 1, []], "Step.runs: expected `array` of length >= 1"),
        ([LEASE, 1, [GOOD_RUN] * 4097], "Step.runs: expected `array` of length <= 4096"),
        ([LEASE, 1, [GOOD_RUN], [], ["soon"]], "Step.compute_s[0]: expected `float`, got `str`"),
        ([LEASE, 1, [GOOD_RUN], [], [1, float("nan")]], "Step.compute_s[1]: expected `float`"),
        ([LEASE, True, [GOOD_RUN]], "Step.step: expected `int`, got `bool`"),
    ],
)
def test_a_bad_value_is_refused_by_message_and_field(fields, where):
    with pytest.raises(RemoteProtocolError, match=re.escape(where)):
        decode(Step.TAG, pack(fields))


def test_text_that_is_not_utf_8_is_refused():
    metadata = encode(Goodbye(reason="abc")).replace(b"abc", b"a\xffc")
    with pytest.raises(RemoteProtocolError, match="Goodbye"):
        decode(Goodbye.TAG, metadata)


def test_lists_nested_without_end_are_refused():
    with pytest.raises(RemoteProtocolError):
        decode(Step.TAG, b"\x91" * 100_000)


@pytest.mark.parametrize(
    "later_fields", [["manager", "x", None], ["manager", "x", None, "new"], [], [{"new": 1}]]
)
def test_another_version_is_named_whatever_follows_it(later_fields):
    with pytest.raises(VersionMismatch) as caught:
        decode(Hello.TAG, pack([PROTOCOL_VERSION + 1, *later_fields]))
    assert (caught.value.ours, caught.value.theirs) == (PROTOCOL_VERSION, PROTOCOL_VERSION + 1)
    assert "install the same release" in str(caught.value)


def test_a_bad_field_of_our_own_version_is_no_mismatch_of_versions():
    with pytest.raises(RemoteProtocolError, match=r"Hello\.role") as caught:
        decode(Hello.TAG, pack([PROTOCOL_VERSION, "king", "x"]))
    assert not isinstance(caught.value, VersionMismatch)


@pytest.mark.parametrize(
    "message",
    [
        Ping(number=-1),
        Ping(number=2**80),
        Ping(number="one"),  # type: ignore[arg-type]
        Ping(number=object()),  # type: ignore[arg-type]
        Goodbye(reason="x" * (MAX_REASON_CHARS + 1)),
        Goodbye(reason="\ud800"),
        Lease(lease=b"short", min_blocks=1, want_blocks=1),
        Step(lease=LEASE, step=1, runs=[]),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_no_peer_would_accept_is_not_sent(message):
    with pytest.raises(LocalProtocolError, match=f"cannot send {type(message).__name__}"):
        encode(message)


# --- the payload of a step -------------------------------------------------------------------


def test_a_payload_is_cut_where_the_runs_say():
    parts = step_payload(STEP, memoryview(STEP_PAYLOAD), hidden_size=2, itemsize=4)
    assert parts.token_ids.cast("i").tolist() == [5, 6, 7]
    assert parts.tables.cast("i").tolist() == [0, 1, 2]
    assert parts.histories.cast("i").tolist() == [9]
    assert parts.offset_tokens.cast("i").tolist() == [5, 8]
    assert parts.offset_values.cast("f").tolist() == [1.5, -2.5]
    assert parts.masks.cast("I").tolist() == [0x80000007]
    assert parts.hidden.cast("f").tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_the_parts_of_a_payload_are_views_of_it():
    payload = bytearray(STEP_PAYLOAD)
    parts = step_payload(STEP, memoryview(payload), hidden_size=2, itemsize=4)
    parts.hidden[:4] = b"\xff" * 4
    assert payload[48:52] == b"\xff" * 4


@pytest.mark.parametrize("difference", [-1, 1, -len(STEP_PAYLOAD), 4])
def test_a_payload_of_another_length_is_refused_with_the_numbers(difference):
    payload = memoryview(bytes(len(STEP_PAYLOAD) + difference))
    with pytest.raises(RemoteProtocolError, match=f"{len(payload)} bytes.* announce 72 "):
        step_payload(STEP, payload, hidden_size=2, itemsize=4)


def test_a_payload_for_another_width_is_refused():
    with pytest.raises(RemoteProtocolError, match="3 tokens of 3 x 4 bytes"):
        step_payload(STEP, memoryview(STEP_PAYLOAD), hidden_size=3, itemsize=4)


def test_runs_that_announce_more_than_memory_holds_are_refused_like_any_other():
    huge = Run(
        sequence=1,
        start=0,
        num_tokens=2**31 - 1,
        num_blocks=2**31 - 1,
        rope_length=0,
        sampling=Sampling(num_history=2**31 - 1, num_offsets=2**31 - 1, num_mask_words=2**31 - 1),
    )
    step = Step(lease=LEASE, step=1, runs=[huge] * 4096)
    with pytest.raises(RemoteProtocolError, match="announce"):
        step_payload(step, memoryview(b""), hidden_size=2**31 - 1, itemsize=8)


runs = st.builds(
    Run,
    sequence=st.integers(0, 100),
    start=st.integers(0, 100),
    num_tokens=st.integers(1, 9),
    num_blocks=st.integers(0, 9),
    rope_length=st.just(0),
    sampling=st.none()
    | st.builds(
        Sampling,
        num_history=st.integers(0, 9),
        num_offsets=st.integers(0, 9),
        num_mask_words=st.integers(0, 9),
    ),
)


@given(
    runs=st.lists(runs, min_size=1, max_size=5),
    hidden_size=st.integers(1, 8),
    itemsize=st.sampled_from([2, 4]),
)
def test_what_is_packed_has_the_length_that_the_runs_announce(runs, hidden_size, itemsize):
    step = Step(lease=LEASE, step=1, runs=runs, faults=[Fault(sequence=1, worker="", reason="")])
    num_tokens = sum(run.num_tokens for run in runs)
    num_blocks = sum(run.num_blocks for run in runs)
    num_history = sum(run.sampling.num_history for run in runs if run.sampling)
    num_offsets = sum(run.sampling.num_offsets for run in runs if run.sampling)
    num_mask_words = sum(run.sampling.num_mask_words for run in runs if run.sampling)
    offsets = [(at, -0.5 * at) for at in range(num_offsets)]
    tables = pack_step_tables(range(num_tokens), range(num_blocks), range(num_history), offsets)
    masks = struct.pack(f"<{num_mask_words}I", *range(num_mask_words))
    payload = memoryview(tables + masks + bytes(num_tokens * hidden_size * itemsize))
    layout = step_layout(step, hidden_size, itemsize)
    parts = step_payload(step, payload, hidden_size, itemsize)
    assert len(payload) == layout.payload_bytes
    assert parts.token_ids.cast("i").tolist() == list(range(num_tokens))
    assert parts.tables.cast("i").tolist() == list(range(num_blocks))
    assert parts.histories.cast("i").tolist() == list(range(num_history))
    assert parts.offset_tokens.cast("i").tolist() == list(range(num_offsets))
    assert parts.offset_values.cast("f").tolist() == [-0.5 * at for at in range(num_offsets)]
    assert parts.masks.cast("I").tolist() == list(range(num_mask_words))


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 1.5])
def test_a_number_that_does_not_fit_32_bits_is_not_packed(number):
    with pytest.raises(LocalProtocolError, match="32 bits"):
        pack_step_tables([number], [], [])


# --- the payload of its answer ---------------------------------------------------------------


def done_with(*scored: Scored) -> StepDone:
    return StepDone(lease=LEASE, step=1, drawn=[], scored=list(scored))


def scored(sequence: int, num_rows: int, top: int = 1) -> Scored:
    return Scored(sequence=sequence, start=1, num_rows=num_rows, top=top)


def test_the_rows_of_each_sequence_are_views_of_the_payload():
    payload = bytearray(range(12 * 2 + 4 * 3))
    rows = step_scores(done_with(scored(7, 2), scored(8, 3, top=0)), memoryview(payload))
    assert {number: bytes(view) for number, view in rows.items()} == {
        7: bytes(range(24)),
        8: bytes(range(24, 36)),
    }
    payload[24] = 99
    assert rows[8][0] == 99
    assert step_scores(done_with(), memoryview(b"")) == {}


@pytest.mark.parametrize(
    ("entries", "num_bytes", "words"),
    [
        ([scored(7, 2)], 23, "carries 23 bytes of payload, its 1 entries .* announce 24"),
        ([], 4, "carries 4 bytes of payload, its 0 entries .* announce 0"),
        ([scored(7, 2**31 - 1, top=100)] * 4096, 0, "announce"),
        ([scored(7, 1), scored(7, 1)], 24, "of sequence 7 twice"),
    ],
)
def test_rows_that_are_not_as_announced_are_refused(entries, num_bytes, words):
    with pytest.raises(RemoteProtocolError, match=words):
        step_scores(done_with(*entries), memoryview(bytes(num_bytes)))


def test_the_longest_step_with_the_most_alternatives_fits_an_answer():
    assert 4096 * score_bytes(100) < MAX_SCORE_BYTES
