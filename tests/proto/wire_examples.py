"""One example of every message, and hypothesis strategies made from the schemas themselves."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from proto.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    AdapterDone,
    AdapterFacts,
    AdapterRefused,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    Challenge,
    Drawn,
    DropAdapter,
    Fault,
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
    Run,
    Sampling,
    Scored,
    Scoring,
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
    WorkerFacts,
)

LEASE = bytes(range(16))
NONCE = bytes(range(32))
MAC = bytes(range(32, 64))


class Example(NamedTuple):
    message: Message
    epoch: int = 0
    payload: bytes = b""


FACTS = WorkerFacts(
    listen="127.0.0.1:7711",
    host="board-2",
    pid=4321,
    model="demo",
    model_path="",
    fingerprint="9f86d081884c7d65",
    section=1,
    num_sections=2,
    start_layer=3,
    end_layer=6,
    num_layers=6,
    hidden_size=2,
    vocab_size=4096,
    max_context=2048,
    dtype="float32",
    device="cpu",
    stage_bytes=3_500_000,
    block_tokens=16,
    block_bytes=98_304,
    total_blocks=512,
    free_blocks=500,
    max_step_tokens=4096,
    quantize="int4",
    kv_quantize="int8",
)
HELLO = Hello(version=PROTOCOL_VERSION, role=Role.MANAGER, agent="comboio/0.1.0")
WELCOME = Welcome(version=PROTOCOL_VERSION, agent="comboio/0.1.0", worker=FACTS)

STEP = Step(
    lease=LEASE,
    step=70_000,
    runs=[
        Run(
            sequence=1,
            start=0,
            num_tokens=2,
            num_blocks=1,
            rope_length=2,
            scoring=Scoring(first_row=0, num_rows=2, top=1, next_token=8),
        ),
        Run(
            sequence=2,
            start=16,
            num_tokens=1,
            num_blocks=2,
            rope_length=17,
            sampling=Sampling(
                seed=7,
                draw=3,
                temperature=0.5,
                top_k=40,
                repetition_penalty=1.5,
                num_history=1,
                num_offsets=2,
                num_mask_words=1,
            ),
            state_slot=4,
            adapter=1,
        ),
    ],
    faults=[Fault(sequence=3, worker="127.0.0.1:7710", reason="not a number")],
    compute_s=[0.25],
)
# Token ids 5 6 7, block tables 0 | 1 2, history 9, 1.5 more for token 5 and 2.5 less for token 8,
# a mask that allows tokens 0 to 2 and 31, three hidden states two wide.
STEP_PAYLOAD = struct.pack(
    "<9i2fI6f",
    *(5, 6, 7, 0, 1, 2, 9, 5, 8),
    *(1.5, -2.5),
    0x80000007,
    *(0.5 * n for n in range(6)),
)

ADAPTER = AdapterFacts(
    name="medicine",
    path="/srv/adapters/medicine",
    fingerprint="9f86d081884c7d65",
    num_bytes=1_300_000,
    num_modules=14,
    leases=1,
)

EXAMPLES: dict[type[Message], Example] = {
    Challenge: Example(Challenge(version=PROTOCOL_VERSION, nonce=NONCE)),
    Proof: Example(Proof(mac=MAC)),
    ProofAccepted: Example(ProofAccepted(mac=MAC)),
    Hello: Example(
        Hello(version=PROTOCOL_VERSION, role=Role.NEIGHBOUR, agent="comboio/0.1.0", lease=LEASE)
    ),
    Welcome: Example(WELCOME),
    Refused: Example(Refused(reason="this worker is still loading", loading_percent=43)),
    Lease: Example(Lease(lease=LEASE, min_blocks=8, want_blocks=300, trace=True)),
    Leased: Example(Leased(lease=LEASE, blocks=300), epoch=1),
    Route: Example(Route(lease=LEASE, next="127.0.0.1:7711"), epoch=1),
    Routed: Example(Routed(lease=LEASE), epoch=1),
    LinkLost: Example(LinkLost(lease=LEASE, next="127.0.0.1:7711", reason="no answer"), epoch=2),
    Release: Example(Release(lease=LEASE)),
    Goodbye: Example(Goodbye(reason="café closed")),
    Step: Example(STEP, epoch=0x01020304, payload=STEP_PAYLOAD),
    StepDone: Example(
        StepDone(
            lease=LEASE,
            step=70_000,
            drawn=[Drawn(sequence=2, token=262, logprob=-0.5, top=[(262, -0.5), (5, -1.25)])],
            compute_s=[0.25, 0.5],
            scored=[Scored(sequence=1, start=1, num_rows=2, top=1)],
        ),
        epoch=0x01020304,
        # token 6 behind token 5, and the likeliest there, 9; token 8 behind both, and 8 itself
        payload=struct.pack("<fiffif", -2.0, 9, -0.5, -0.25, 8, -0.25),
    ),
    StepReport: Example(
        StepReport(
            lease=LEASE,
            step=70_000,
            num_tokens=3,
            received_s=1.0,
            started_s=1.25,
            finished_s=1.5,
            sent_s=1.75,
        )
    ),
    AdaptersRequest: Example(AdaptersRequest()),
    Adapters: Example(Adapters(adapters=[ADAPTER])),
    AddAdapter: Example(AddAdapter(name="medicine", path="/srv/adapters/medicine")),
    KeepAdapter: Example(KeepAdapter(name="medicine")),
    DropAdapter: Example(DropAdapter(name="medicine")),
    UseAdapter: Example(UseAdapter(lease=LEASE, number=1, name="medicine")),
    ReleaseAdapter: Example(ReleaseAdapter(lease=LEASE, number=1)),
    AdapterDone: Example(AdapterDone(adapter=ADAPTER)),
    AdapterRefused: Example(AdapterRefused(name="medicine", reason="there is no such folder")),
    HoldSection: Example(HoldSection(fingerprint="9f86d081884c7d65", start_layer=0, end_layer=6)),
    SectionLoading: Example(SectionLoading(percent=43)),
    SectionHeld: Example(SectionHeld(worker=FACTS)),
    SectionRefused: Example(SectionRefused(reason="it serves another manager")),
    Ping: Example(Ping(number=2**31 - 1)),
    Pong: Example(Pong(number=2**31 - 1, clock_s=1234.5)),
    StatusRequest: Example(StatusRequest()),
    Status: Example(
        Status(
            clock_s=1234.5,
            steps=10,
            tokens=1000,
            compute_s=5.5,
            step_s=0.55,
            cpu_s=6.0,
            rss_bytes=2**30,
            peak_rss_bytes=2**31,
            read_bytes=3_500_000,
            received_bytes=2**33,
            sent_bytes=2**34,
            total_blocks=512,
            free_blocks=500,
            leases=1,
            gpu_busy=0.5,
            adapters=2,
            adapter_bytes=2_600_000,
            room_bytes=2**31,
            working_s=0.5,
        )
    ),
}

KINDS = sorted(MESSAGES.values(), key=lambda kind: kind.TAG)


def messages(kinds: Sequence[type[Message]] = KINDS) -> st.SearchStrategy[Message]:
    """Any message whose fields are within their bounds."""
    return st.one_of([_values(inspect.type_info(kind)) for kind in kinds])


def _values(kind: Any) -> st.SearchStrategy[Any]:
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            parts = {field.name: _values(field.type) for field in fields}
            if "version" in parts:  # another one is another release's message
                parts["version"] = st.just(PROTOCOL_VERSION)
            return st.builds(cls, **parts)
        case inspect.UnionType(types=types):
            return st.one_of([_values(one) for one in types])
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, gt=above, le=high):
            least = low if low is not None else above
            return st.floats(least, high, allow_nan=False, exclude_min=above is not None)
        case inspect.StrType(min_length=shortest, max_length=longest):
            return st.text(min_size=shortest or 0, max_size=min(longest, 20))
        case inspect.BytesType(min_length=shortest, max_length=longest):
            return st.binary(min_size=shortest, max_size=longest)
        case inspect.EnumType(cls=cls):
            return st.sampled_from(cls)
        case inspect.ListType(item_type=item, min_length=shortest):
            return st.lists(_values(item), min_size=shortest or 0, max_size=3)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(_values, items))
    raise AssertionError(f"no strategy for {kind}")


def fields_of(message: Message) -> list[Any]:
    """The message as the plain list that crosses the wire."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    assert isinstance(fields, list)
    return fields
