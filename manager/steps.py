"""Turn the scheduler's steps into frames for the first worker, in the order they were issued.

Looks tokens up in the embedding (`engine.entry`) and packs the payload. A decode step is packed
at once on the event loop; a prefill chunk's embedding goes to a thread, and what is issued
meanwhile waits behind it. Knows no scheduler state and waits for no answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engine.requests import PlannedRun, RunStep
from manager.sequences import ActiveSequence, Constraint
from proto.codec import pack_step_tables
from proto.messages import Run, Scoring, Step

if TYPE_CHECKING:
    from torch import Tensor

    from engine.entry import Entry

# Looking up 64 Ki values takes about as long as handing the job to a thread and back, 100 us.
INLINE_VALUES: Final = 64 * 1024

# Steps that may wait for the embedding thread: more than the scheduler ever has in flight.
MAX_WAITING: Final = 4096

# step, tables (masks included), hidden states, epoch
SendStep = Callable[[Step, bytes, memoryview, int], None]


@dataclass(frozen=True, slots=True)
class PackedStep:
    """A step without its hidden states: everything that depends on the state at issue."""

    message: Step
    epoch: int
    tables: bytes
    token_ids: list[int]
    positions: list[int]
    constraints: list[Constraint]  # of the runs that draw under one, in the order of the runs


class StepWriter:
    """Writes steps of one lease; the order of `write` calls is the order on the link."""

    def __init__(
        self,
        lease: bytes,
        entry: Entry,
        send: SendStep,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._lease, self._entry, self._send = lease, entry, send
        self._on_failure = on_failure
        self._inline_tokens = max(1, INLINE_VALUES // entry.hidden_size)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._waiting: asyncio.Queue[PackedStep] = asyncio.Queue(MAX_WAITING)
        self._num_waiting = 0
        self._task = asyncio.ensure_future(self._write_waiting())

    @property
    def vocab_size(self) -> int:
        """Token ids below it have an embedding."""
        return self._entry.vocab_size

    def write(self, command: RunStep, sequences: Mapping[int, ActiveSequence]) -> None:
        """Send a step, at once where that is quick."""
        packed = pack(self._lease, command, sequences)
        is_quick = len(packed.token_ids) <= self._inline_tokens and not packed.constraints
        if self._num_waiting == 0 and is_quick:
            self._send_packed(packed, *self._payload(packed))
        else:
            self._num_waiting += 1
            self._waiting.put_nowait(packed)

    async def close(self) -> None:
        """Send nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _write_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                packed = await self._waiting.get()
                payload = await loop.run_in_executor(self._executor, self._payload, packed)
                self._num_waiting -= 1
                self._send_packed(packed, *payload)
        except Exception as exc:
            self._on_failure(exc)

    def _payload(self, packed: PackedStep) -> tuple[bytes, memoryview]:
        # A constraint is as far as its sequence was at issue: nothing new can come before this
        # step returns.
        masks = [constraint.mask() for constraint in packed.constraints]
        hidden = bytes_of(self._entry.embed(packed.token_ids, packed.positions))
        return packed.tables + b"".join(masks), hidden

    def _send_packed(self, packed: PackedStep, tables: bytes, hidden: memoryview) -> None:
        self._send(packed.message, tables, hidden, packed.epoch)


def pack(lease: bytes, command: RunStep, sequences: Mapping[int, ActiveSequence]) -> PackedStep:
    """Put the runs of a step into the wire's words."""
    runs: list[Run] = []
    token_ids: list[int] = []
    positions: list[int] = []
    tables: list[int] = []
    histories: list[int] = []
    offsets: list[tuple[int, float]] = []
    constraints: list[Constraint] = []
    for planned in command.runs:
        sequence = sequences[planned.sequence]
        added = sequence.offsets if planned.draws else []
        runs.append(_run(planned, sequence, len(added)))
        token_ids += planned.tokens
        positions += range(planned.start, planned.start + len(planned.tokens))
        tables += planned.blocks
        if planned.draws:
            histories += sequence.history
            offsets += added
            if sequence.constraint is not None:
                constraints.append(sequence.constraint)
    message = Step(lease=lease, step=command.step, runs=runs)
    packed_tables = pack_step_tables(token_ids, tables, histories, offsets)
    return PackedStep(message, command.epoch, packed_tables, token_ids, positions, constraints)


def _run(planned: PlannedRun, sequence: ActiveSequence, num_offsets: int) -> Run:
    return Run(
        sequence=planned.sequence,
        start=planned.start,
        num_tokens=len(planned.tokens),
        num_blocks=len(planned.blocks),
        rope_length=planned.rope_length,
        sampling=sequence.sampling(planned.draw, num_offsets) if planned.draws else None,
        state_slot=planned.state_slot,
        adapter=sequence.adapter,
        scoring=_scoring(planned, sequence),
    )


def _scoring(planned: PlannedRun, sequence: ActiveSequence) -> Scoring | None:
    rows = planned.scoring
    if rows is None:
        return None
    return Scoring(
        first_row=rows.first_row,
        num_rows=rows.num_rows,
        top=sequence.options.prompt_logprobs or 0,
        next_token=rows.next_token,
    )


def bytes_of(values: Tensor) -> memoryview:
    """The tensor's own memory; numpy has no bfloat16, so its bits travel as integers."""
    import torch

    values = values.detach().contiguous()
    return values.view(torch.uint8).numpy().data.cast("B")
