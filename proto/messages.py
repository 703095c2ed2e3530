"""Every message that crosses a link, one frozen struct each.

A message is the msgpack metadata of a frame; its tag is the frame's type byte. Tensors and
integer tables do not live here: they follow raw in the payload, and the message says how many
of each there are. A tag is never reused; a new field goes last and has a default.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, ClassVar, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION: Final = 1

# Bounds on what a peer may say. They are generous for any model known today and small enough
# that no message can make the receiver allocate more than its frame already holds.
MAX_NAME_CHARS: Final = 256
MAX_REASON_CHARS: Final = 4096
MAX_RUNS: Final = 4096
MAX_STAGES: Final = 1024
MAX_ADAPTERS: Final = 128  # on one worker; their list fits the metadata of a frame
MAX_ADAPTER_NAME_CHARS: Final = 64
MAX_ADAPTER_PATH_CHARS: Final = 1024
# Of a step's prompt tokens: 4096 rows of at most 804 bytes each are 3.1 MiB.
MAX_SCORE_BYTES: Final = 4 * 1024 * 1024

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Mac = Annotated[bytes, Meta(min_length=32, max_length=32)]
AdapterName = Annotated[str, Meta(min_length=1, max_length=MAX_ADAPTER_NAME_CHARS)]
AdapterPath = Annotated[str, Meta(min_length=1, max_length=MAX_ADAPTER_PATH_CHARS)]
TopCount = Annotated[int, Meta(ge=0, le=100)]
LeaseId = Annotated[bytes, Meta(min_length=16, max_length=16)]
SequenceId = Annotated[int, Meta(ge=0, le=2**53)]
StepId = Annotated[int, Meta(ge=0, le=2**53)]


class Struct(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Base of what travels inside metadata: a msgpack array, checked field by field.

    Subclasses inherit `array_like` and `forbid_unknown_fields`; `frozen` and `kw_only` are said
    again by each, as msgspec and type checkers want them.
    """


class Message(Struct, frozen=True, kw_only=True):
    """Base of every message; `TAG` is the frame's type byte."""

    TAG: ClassVar[int]
    HAS_PAYLOAD: ClassVar[bool] = False  # a payload on any other message is refused
    MAX_PAYLOAD_BYTES: ClassVar[int | None] = None  # None: what the link allows


class Role(Enum):
    """Who opens a link."""

    MANAGER = "manager"  # owns sequences; asks for leases and sends steps
    NEIGHBOUR = "neighbour"  # the stage before this one, on behalf of one lease
    OBSERVER = "observer"  # only asks for status


# --- opening a link --------------------------------------------------------------------------


class Challenge(Message, frozen=True, kw_only=True):
    """First frame each way on a link that has a secret; the opener speaks first."""

    TAG = 1
    version: Count
    nonce: Nonce


class Proof(Message, frozen=True, kw_only=True):
    """Opener to listener: I know the secret."""

    TAG = 2
    mac: Mac


class ProofAccepted(Message, frozen=True, kw_only=True):
    """Listener to opener: so do you, and I know it too."""

    TAG = 3
    mac: Mac


class Hello(Message, frozen=True, kw_only=True):
    """Opener to listener: who I am and which protocol I speak."""

    TAG = 4
    version: Count
    role: Role
    agent: Name  # "comboio/0.1.0"
    lease: LeaseId | None = None  # NEIGHBOUR only: the lease whose steps this link carries


class Welcome(Message, frozen=True, kw_only=True):
    """Listener to opener: what this worker holds."""

    TAG = 5
    version: Count
    agent: Name
    worker: WorkerFacts


class Refused(Message, frozen=True, kw_only=True):
    """Either side, at any time before steps flow: no, and why, in one sentence."""

    TAG = 6
    reason: Reason
    # How far a worker is that still loads: to call again later is worth it. None: it is not.
    loading_percent: Annotated[int, Meta(ge=0, le=100)] | None = None


class WorkerFacts(Struct, frozen=True, kw_only=True):
    """What a worker says of itself; everything that must agree along a chain is here."""

    listen: Name  # HOST:PORT as the worker bound it
    host: Name  # hostname, for tables
    pid: Count
    model: Name  # a name for people
    model_path: Annotated[str, Meta(max_length=4096)]  # what was given as --model; "" for the demo
    fingerprint: Name  # hex digest of config + tensor index; equal along a chain
    section: Count | None  # None where --layers was given
    num_sections: Count | None
    start_layer: Count
    end_layer: Count
    num_layers: Count
    hidden_size: Count
    vocab_size: Count
    max_context: Count
    dtype: Name  # of weights, KV and the hidden states on the wire: "float32", ...
    device: Name
    stage_bytes: Bytes  # weights held
    block_tokens: Count
    block_bytes: Bytes  # of one KV block over all layers of this stage
    total_blocks: Count
    free_blocks: Count
    max_step_tokens: Count
    quantize: Name = "none"  # to what weights are rounded: "none", "int8", "int4"
    kv_quantize: Name = "none"  # the same of keys and values: "none", "int8"


# --- leases and the chain --------------------------------------------------------------------


class Lease(Message, frozen=True, kw_only=True):
    """Manager to worker: reserve KV blocks for my sequences, numbered from 0."""

    TAG = 16
    lease: LeaseId
    min_blocks: Count
    want_blocks: Count
    trace: bool = False  # send a StepReport for every step


class Leased(Message, frozen=True, kw_only=True):
    """Worker to manager: so many blocks are yours, between `min_blocks` and `want_blocks`."""

    TAG = 17
    lease: LeaseId
    blocks: Count


class Route(Message, frozen=True, kw_only=True):
    """Manager to worker: of this epoch on, hand my steps to `next`; None makes you the last."""

    TAG = 18
    lease: LeaseId
    next: Name | None


class Routed(Message, frozen=True, kw_only=True):
    """Worker to manager: the link to the next worker stands."""

    TAG = 19
    lease: LeaseId


class LinkLost(Message, frozen=True, kw_only=True):
    """Worker to manager: my link to the next worker broke, or could not be made."""

    TAG = 20
    lease: LeaseId
    next: Name
    reason: Reason


class Release(Message, frozen=True, kw_only=True):
    """Manager to worker: the lease and its KV are free again."""

    TAG = 21
    lease: LeaseId


class Goodbye(Message, frozen=True, kw_only=True):
    """Either side: I am closing this link on purpose; nothing follows."""

    TAG = 22
    reason: Reason


# --- steps -----------------------------------------------------------------------------------


class Sampling(Struct, frozen=True, kw_only=True):
    """How the last stage draws the next token of one sequence.

    A pure function of (logits, these fields, the history in the payload): a replay draws the same.
    """

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    draw: Count = 0  # how many tokens this sequence generated before; the RNG's counter
    temperature: Annotated[float, Meta(ge=0, le=1000)] = 0.0  # 0: greedy
    top_k: Count = 0  # 0: off
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    logprobs: TopCount = 0  # top alternatives wanted; 0: none at all
    num_history: Count = 0  # distinct token ids seen so far, in the payload (penalties only)
    num_offsets: Count = 0  # tokens with a number to add to their logit, in the payload
    num_mask_words: Count = 0  # words of the mask of allowed tokens; 0: all are


class Scoring(Struct, frozen=True, kw_only=True):
    """Rows of a run whose next tokens are known, and get a log-probability."""

    first_row: Count  # of the run, from 0; row r tells how likely token r + 1 is
    num_rows: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    top: TopCount  # likeliest tokens wanted with each
    next_token: Count | None = None  # behind the run's last token, where that row is one of them


class Run(Struct, frozen=True, kw_only=True):
    """A contiguous stretch of one sequence inside a step."""

    sequence: SequenceId
    start: Count  # position of the first token within its sequence
    num_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    num_blocks: Count  # entries of its block table in the payload, covering [0, start + num_tokens)
    rope_length: (
        Count  # length that length-dependent rotary tables are made for; see docs/protocol.md
    )
    sampling: Sampling | None = None  # None: more of the prompt follows, nothing is drawn
    state_slot: Count | None = None  # place of its fixed-size state; None where the model has none
    adapter: Count | None = None  # the number that UseAdapter gave it; None: the model alone
    scoring: Scoring | None = None  # None: nobody asks how likely the prompt's tokens are


class Fault(Struct, frozen=True, kw_only=True):
    """One sequence of a step that could not be computed; the rest of the step goes on."""

    sequence: SequenceId
    worker: Name
    reason: Reason


class Step(Message, frozen=True, kw_only=True):
    """One micro-batch on its way through the stages.

    Payload, all little endian, in this order, where T is the sum of the runs' `num_tokens`:
    token ids int32[T]; block tables int32[sum of num_blocks]; histories int32[sum of
    num_history]; offset tokens int32[sum of num_offsets]; offset values float32[the same]; masks
    uint32[sum of num_mask_words]; hidden states (T, hidden_size) in the dtype that the link agreed
    on.
    """

    TAG = 32
    HAS_PAYLOAD = True
    lease: LeaseId
    step: StepId
    runs: Annotated[list[Run], Meta(min_length=1, max_length=MAX_RUNS)]
    faults: Annotated[list[Fault], Meta(max_length=MAX_RUNS)] = []
    compute_s: Annotated[list[Seconds], Meta(max_length=MAX_STAGES)] = []  # one a stage passed


class Drawn(Struct, frozen=True, kw_only=True):
    """The token drawn for one sequence."""

    sequence: SequenceId
    token: Count
    logprob: float | None = None
    top: Annotated[list[tuple[Count, float]], Meta(max_length=100)] = []  # (token, logprob)


class Scored(Struct, frozen=True, kw_only=True):
    """How likely some tokens of one sequence's prompt are; the numbers are in the payload."""

    sequence: SequenceId
    start: Count  # position of the first of these tokens within its sequence
    num_rows: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    top: TopCount


class StepDone(Message, frozen=True, kw_only=True):
    """Last worker to manager: what was drawn. Runs without sampling have no entry.

    Payload: for every entry of `scored`, in order, `num_rows` rows of log-probability float32;
    likeliest tokens int32[top]; their log-probabilities float32[top]. All little endian.
    """

    TAG = 33
    HAS_PAYLOAD = True
    MAX_PAYLOAD_BYTES = MAX_SCORE_BYTES
    lease: LeaseId
    step: StepId
    drawn: Annotated[list[Drawn], Meta(max_length=MAX_RUNS)]
    faults: Annotated[list[Fault], Meta(max_length=MAX_RUNS)] = []
    compute_s: Annotated[list[Seconds], Meta(max_length=MAX_STAGES)] = []
    scored: Annotated[list[Scored], Meta(max_length=MAX_RUNS)] = []


class StepReport(Message, frozen=True, kw_only=True):
    """Worker to manager, only for a traced lease: when a step passed here.

    Times are this worker's monotonic clock; Pong tells how it relates to the manager's.
    """

    TAG = 34
    lease: LeaseId
    step: StepId
    num_tokens: Count
    received_s: Seconds  # whole frame is here
    started_s: Seconds  # torch begins
    finished_s: Seconds  # torch ends
    sent_s: Seconds  # the frame to the next is handed to the socket


# --- adapters --------------------------------------------------------------------------------


class AdapterFacts(Struct, frozen=True, kw_only=True):
    """What a worker says of an adapter that it holds."""

    name: AdapterName
    path: AdapterPath  # its folder, on the worker's machine
    fingerprint: Name  # hex digest of its config, list of tensors, and a sample of each
    num_bytes: Bytes  # held in memory, of this stage's layers
    num_modules: Count  # that it adapts in this stage's layers
    leases: Count  # that use it now


class AdaptersRequest(Message, frozen=True, kw_only=True):
    """Anyone to worker: which adapters do you hold?"""

    TAG = 64


class Adapters(Message, frozen=True, kw_only=True):
    """Worker's answer: those that everybody may use, by name."""

    TAG = 65
    adapters: Annotated[list[AdapterFacts], Meta(max_length=MAX_ADAPTERS)]


class AddAdapter(Message, frozen=True, kw_only=True):
    """Manager to worker: load an adapter for this link alone, and until the link closes."""

    TAG = 66
    name: AdapterName
    path: AdapterPath  # a folder on the worker's machine


class KeepAdapter(Message, frozen=True, kw_only=True):
    """Manager to worker: what this link added is for everybody from now on, and stays."""

    TAG = 67
    name: AdapterName


class DropAdapter(Message, frozen=True, kw_only=True):
    """Manager to worker: nobody new may use it; it is freed when the last lease lets it go."""

    TAG = 68
    name: AdapterName


class UseAdapter(Message, frozen=True, kw_only=True):
    """Manager to worker: in this lease's runs, `number` is going to mean this adapter."""

    TAG = 69
    lease: LeaseId
    number: Count
    name: AdapterName


class ReleaseAdapter(Message, frozen=True, kw_only=True):
    """Manager to worker: no run of this lease has this number any more."""

    TAG = 70
    lease: LeaseId
    number: Count


class AdapterDone(Message, frozen=True, kw_only=True):
    """Worker to manager: what was asked about this adapter is done, and so it stands now."""

    TAG = 71
    adapter: AdapterFacts


class AdapterRefused(Message, frozen=True, kw_only=True):
    """Worker to manager: no, and why, in one sentence; the link stays."""

    TAG = 72
    name: AdapterName
    reason: Reason


# --- holding other layers --------------------------------------------------------------------


class HoldSection(Message, frozen=True, kw_only=True):
    """Manager to worker: a worker was lost; hold these layers in the place of those you hold."""

    TAG = 80
    fingerprint: Name  # of the model that is meant
    start_layer: Count
    end_layer: Count  # not included


class SectionLoading(Message, frozen=True, kw_only=True):
    """Worker to manager: so far is it, whenever that has changed."""

    TAG = 81
    percent: Annotated[int, Meta(ge=0, le=100)]


class SectionHeld(Message, frozen=True, kw_only=True):
    """Worker to manager: done, and so do I stand now; leases of before are gone."""

    TAG = 82
    worker: WorkerFacts


class SectionRefused(Message, frozen=True, kw_only=True):
    """Worker to manager: no, and why, in one sentence; what it held it holds still."""

    TAG = 83
    reason: Reason


# --- looking after a link --------------------------------------------------------------------


class Ping(Message, frozen=True, kw_only=True):
    """Either side: are you there?"""

    TAG = 48
    number: Count


class Pong(Message, frozen=True, kw_only=True):
    """Answer to Ping, sent by the event loop even while torch computes."""

    TAG = 49
    number: Count
    clock_s: Seconds  # the answerer's monotonic clock


class StatusRequest(Message, frozen=True, kw_only=True):
    """Anyone to worker: how are you?"""

    TAG = 50


class Status(Message, frozen=True, kw_only=True):
    """Worker's counters since it started; the asker makes rates of two of them."""

    TAG = 51
    clock_s: Seconds
    steps: Bytes
    tokens: Bytes
    compute_s: Seconds  # torch's thread at work
    step_s: Seconds | None  # moving average of one step's compute; None before the first
    cpu_s: Seconds
    rss_bytes: Bytes
    peak_rss_bytes: Bytes
    read_bytes: Bytes  # checkpoint bytes read at load
    received_bytes: Bytes
    sent_bytes: Bytes
    total_blocks: Count
    free_blocks: Count
    leases: Count
    gpu_memory_bytes: Bytes | None = None
    gpu_busy: Annotated[float, Meta(ge=0, le=1)] | None = None
    adapters: Count = 0  # held, those that wait for their last lease included
    adapter_bytes: Bytes = 0  # of memory
    room_bytes: Bytes = 0  # of weights, that it could hold in the place of those it holds
    working_s: Seconds = 0.0  # for so long torch has been at the step that it computes now


MESSAGES: Final[dict[int, type[Message]]] = {
    kind.TAG: kind
    for kind in (
        Challenge,
        Proof,
        ProofAccepted,
        Hello,
        Welcome,
        Refused,
        Lease,
        Leased,
        Route,
        Routed,
        LinkLost,
        Release,
        Goodbye,
        Step,
        StepDone,
        StepReport,
        AdaptersRequest,
        Adapters,
        AddAdapter,
        KeepAdapter,
        DropAdapter,
        UseAdapter,
        ReleaseAdapter,
        AdapterDone,
        AdapterRefused,
        HoldSection,
        SectionLoading,
        SectionHeld,
        SectionRefused,
        Ping,
        Pong,
        StatusRequest,
        Status,
    )
}
