"""Turn messages into msgpack metadata and back, and a step's payload into its parts.

Refuses what it does not know: an unknown tag, a surplus field, a value of another type or out of
the bounds that `proto.messages` states. Knows nothing of frames, checksums or sockets, and never
looks inside a tensor.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from proto.errors import LocalProtocolError, RemoteProtocolError, VersionMismatch
from proto.messages import (
    MESSAGES,
    PROTOCOL_VERSION,
    Challenge,
    Hello,
    Message,
    Step,
    StepDone,
    Welcome,
)

INT32_BYTES: Final = 4

_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final = {tag: msgspec.msgpack.Decoder(kind) for tag, kind in MESSAGES.items()}


# --- metadata --------------------------------------------------------------------------------


def kind_of(tag: int) -> type[Message]:
    """The message type of a frame's type byte, or RemoteProtocolError."""
    kind = MESSAGES.get(tag)
    if kind is None:
        raise RemoteProtocolError(
            f"a frame has type {tag}, which is no message of protocol version {PROTOCOL_VERSION}"
        )
    return kind


def encode(message: Message) -> bytes:
    """The metadata of one message, read back once, so that no peer has to refuse it.

    Raises:
        LocalProtocolError: a field has the wrong type or is out of its bounds.
    """
    try:
        metadata = _ENCODER.encode(message)
        _DECODERS[message.TAG].decode(metadata)
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"cannot send {_describe(type(message), exc)}") from exc
    return metadata


def decode(tag: int, metadata: bytes | bytearray | memoryview) -> Message:
    """The message that `metadata` holds.

    Raises:
        VersionMismatch: an opening message of another protocol version.
        RemoteProtocolError: anything else that is not exactly this message; names the field.
    """
    try:
        message: Message = _DECODERS[tag].decode(metadata)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        _check_version(tag, metadata)
        raise RemoteProtocolError(f"cannot read {_describe(MESSAGES[tag], exc)}") from exc
    if tag in _VERSIONED:
        _check_version(tag, metadata)
    return message


class _Version(msgspec.Struct, array_like=True):
    """The first field of an opening message; another release may follow it with anything."""

    version: int


# These messages keep their first field for ever, so that two releases can tell each other apart.
_VERSIONED: Final = frozenset({Challenge.TAG, Hello.TAG, Welcome.TAG})


def _check_version(tag: int, metadata: bytes | bytearray | memoryview) -> None:
    if tag not in _VERSIONED:
        return
    try:
        theirs = msgspec.msgpack.decode(metadata, type=_Version).version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return  # not even a version: the field error says more
    if theirs != PROTOCOL_VERSION:
        raise VersionMismatch(PROTOCOL_VERSION, theirs)


def _describe(kind: type[Message], exc: Exception) -> str:
    """`Step.runs[2].start: expected int >= 0`, out of msgspec's path of indices."""
    text = str(exc)
    what, _, path = text.partition(" - at `$")
    return f"{kind.__name__}{_field_path(kind, path.rstrip('`'))}: {what[:1].lower()}{what[1:]}"


def _field_path(kind: type, path: str) -> str:
    """`.runs[2].start` for `[2][2][1]`: structs travel as arrays, people read names."""
    here: Any = msgspec.inspect.type_info(kind)
    names = ""
    for index in re.findall(r"\[(\d+|\.\.\.)\]", path):
        if isinstance(here, msgspec.inspect.UnionType):
            here = next(t for t in here.types if not isinstance(t, msgspec.inspect.NoneType))
        if isinstance(here, msgspec.inspect.StructType):
            field = here.fields[int(index)]
            names, here = f"{names}.{field.name}", field.type
        else:
            names, here = f"{names}[{index}]", getattr(here, "item_type", None)
    return names


# --- the payload of a step -------------------------------------------------------------------


class StepLayout(NamedTuple):
    """Where the parts of a step's payload begin, in bytes from its start."""

    num_tokens: int
    tables_at: int  # token ids are before it, from 0
    histories_at: int
    offsets_at: int  # their tokens; the values follow, as many
    masks_at: int
    hidden_at: int
    payload_bytes: int


class StepPayload(NamedTuple):
    """The parts of a step's payload as views of bytes: nothing is copied.

    All but the last hold little-endian items of 4 bytes; a view keeps the whole received buffer
    alive.
    """

    token_ids: memoryview  # int32
    tables: memoryview  # int32
    histories: memoryview  # int32
    offset_tokens: memoryview  # int32
    offset_values: memoryview  # float32
    masks: memoryview  # uint32
    hidden: memoryview


def step_layout(step: Step, hidden_size: int, itemsize: int) -> StepLayout:
    """What the runs of a step announce; `itemsize` is the bytes of one hidden value."""
    num_tokens = num_blocks = num_history = num_offsets = num_mask_words = 0
    for run in step.runs:
        num_tokens += run.num_tokens
        num_blocks += run.num_blocks
        if run.sampling is not None:
            num_history += run.sampling.num_history
            num_offsets += run.sampling.num_offsets
            num_mask_words += run.sampling.num_mask_words
    tables_at = num_tokens * INT32_BYTES
    histories_at = tables_at + num_blocks * INT32_BYTES
    offsets_at = histories_at + num_history * INT32_BYTES
    masks_at = offsets_at + 2 * num_offsets * INT32_BYTES
    hidden_at = masks_at + num_mask_words * INT32_BYTES
    payload_bytes = hidden_at + num_tokens * hidden_size * itemsize
    return StepLayout(
        num_tokens, tables_at, histories_at, offsets_at, masks_at, hidden_at, payload_bytes
    )


def step_payload(step: Step, payload: memoryview, hidden_size: int, itemsize: int) -> StepPayload:
    """Cut a received payload into its parts.

    Raises:
        RemoteProtocolError: the payload is not as long as the runs announce.
    """
    layout = step_layout(step, hidden_size, itemsize)
    if payload.nbytes != layout.payload_bytes:
        raise RemoteProtocolError(
            f"step {step.step} carries {payload.nbytes} bytes of payload, its runs announce "
            f"{layout.payload_bytes} ({layout.num_tokens} tokens of {hidden_size} x {itemsize} "
            f"bytes and {layout.hidden_at} bytes of tables)"
        )
    values_at = (layout.offsets_at + layout.masks_at) // 2
    return StepPayload(
        payload[: layout.tables_at],
        payload[layout.tables_at : layout.histories_at],
        payload[layout.histories_at : layout.offsets_at],
        payload[layout.offsets_at : values_at],
        payload[values_at : layout.masks_at],
        payload[layout.masks_at : layout.hidden_at],
        payload[layout.hidden_at :],
    )


def pack_step_tables(
    token_ids: Sequence[int],
    tables: Sequence[int],
    histories: Sequence[int],
    offsets: Sequence[tuple[int, float]] = (),
) -> bytes:
    """The first part of a step's payload, up to the masks; those and the hidden states follow as
    buffers of their own.

    Raises:
        LocalProtocolError: a number does not fit 32 bits.
    """
    tokens, values = zip(*offsets, strict=True) if offsets else ((), ())
    integers = len(token_ids) + len(tables) + len(histories) + len(tokens)
    try:
        return struct.pack(
            f"<{integers}i{len(values)}f", *token_ids, *tables, *histories, *tokens, *values
        )
    except (struct.error, OverflowError) as exc:
        raise LocalProtocolError(f"a token id or block id does not fit 32 bits: {exc}") from exc


def mask_words(vocab_size: int) -> int:
    """Words of a mask: a bit a token, the first one in the lowest bit of the first word."""
    return -(-vocab_size // 32)


# --- the payload of a step's answer ----------------------------------------------------------


def score_bytes(top: int) -> int:
    """Of one row: a log-probability, and the likeliest tokens with theirs."""
    return 4 + 2 * INT32_BYTES * top


def step_scores(done: StepDone, payload: memoryview) -> dict[int, memoryview]:
    """The rows of each sequence that `done.scored` names, as views of bytes.

    Raises:
        RemoteProtocolError: the payload is not as long as they announce, or one is named twice.
    """
    announced = sum(scored.num_rows * score_bytes(scored.top) for scored in done.scored)
    if payload.nbytes != announced:
        raise RemoteProtocolError(
            f"the answer to step {done.step} carries {payload.nbytes} bytes of payload, its "
            f"{len(done.scored)} entries of log-probabilities announce {announced}"
        )
    rows: dict[int, memoryview] = {}
    at = 0
    for scored in done.scored:
        if scored.sequence in rows:
            raise RemoteProtocolError(
                f"the answer to step {done.step} has log-probabilities of sequence "
                f"{scored.sequence} twice"
            )
        end = at + scored.num_rows * score_bytes(scored.top)
        rows[scored.sequence], at = payload[at:end], end
    return rows
