"""Compute one step on a stage: payload in, hidden states or tokens out, faults beside them.

Runs on torch's thread. Knows the stage, the lease's KV blocks and the layout of a step's payload;
knows no link. A sequence that cannot be computed becomes a fault and the rest of the step goes on;
an error of the whole step becomes a fault of each of its sequences. Nothing is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from engine.sampling import draw
from engine.stage import StageRun
from proto.codec import StepPayload, step_payload
from proto.errors import Error, StepFailed
from proto.messages import MAX_REASON_CHARS, Drawn, Fault, Run, Sampling, Step
from worker.memory import free_cpu_bytes, is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from engine.kv import BlockCache
    from engine.stage import Stage

INT32: Final = np.dtype("<i4")
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(slots=True)
class Outcome:
    """What became of a step at this stage; `faults` are the new ones only."""

    hidden: memoryview | None = None  # (tokens, hidden_size) for the next stage
    drawn: list[Drawn] = field(default_factory=list)  # of the last stage
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """One run that can be computed, with its places in the step's payload."""

    run: Run
    rows: slice  # of token ids and hidden states
    table: NDArray[np.int32]  # (num_blocks,)
    history: NDArray[np.int32]  # (num_history,)


class StepComputer:
    """A stage and a lease's KV blocks, ready for step after step."""

    def __init__(self, stage: Stage, cache: BlockCache, num_blocks: int, worker: str) -> None:
        self._stage = stage
        self._cache = cache
        self._num_blocks = num_blocks
        self._worker = worker  # HOST:PORT as the manager knows it; faults carry it
        self._dtype = DTYPES[stage.dtype_name]

    def parse(self, step: Step, payload: memoryview) -> StepPayload:
        """Cut a payload into its parts.

        Raises:
            RemoteProtocolError: it is not of exactly the length that `step` announces.
        """
        return step_payload(step, payload, self._stage.hidden_size, self._dtype.itemsize)

    def compute(self, step: Step, payload: StepPayload, *, is_last: bool) -> Outcome:
        """Run the stage's layers on the step; if `is_last`, draw its tokens as well.

        Args:
            payload: from `parse`; read, never written.
        """
        outcome = Outcome()
        try:
            with torch.inference_mode():
                self._compute(step, payload, outcome, is_last)
        except Exception as exc:
            self._fault_all(step, outcome, _reason(exc, step))
        if outcome.hidden is None:  # nobody reads it, but its bytes have their place
            outcome.hidden = payload.hidden
        return outcome

    def fault(self, step: Step, payload: StepPayload, reason: str) -> Outcome:
        """What becomes of a step that is not computed at all."""
        outcome = Outcome(hidden=payload.hidden)
        self._fault_all(step, outcome, reason)
        return outcome

    def _compute(self, step: Step, payload: StepPayload, outcome: Outcome, is_last: bool) -> None:
        stage = self._stage
        token_ids = np.frombuffer(payload.token_ids, INT32)
        parts = list(self._parts(step, payload, token_ids, outcome))
        if not parts:
            return
        hidden = torch.frombuffer(payload.hidden, dtype=self._dtype).view(len(token_ids), -1)
        places = None if len(parts) == len(step.runs) else _places(parts)
        ids = torch.from_numpy(token_ids.astype(np.int64))
        runs = [_stage_run(part) for part in parts]
        if places is None:
            result = stage.forward(ids, hidden, runs, self._cache).to("cpu")
        else:
            part_result = stage.forward(ids[places], hidden[places], runs, self._cache)
            result = torch.zeros_like(hidden)
            result[places] = part_result.to("cpu")
        parts = self._keep_finite(parts, result, outcome)
        if is_last:
            self._draw(parts, result, outcome)
        else:
            outcome.hidden = _bytes_of(result)

    def _parts(
        self, step: Step, payload: StepPayload, token_ids: NDArray[np.int32], outcome: Outcome
    ) -> Iterator[Part]:
        tables = np.frombuffer(payload.tables, INT32)
        histories = np.frombuffer(payload.histories, INT32)
        judged = {fault.sequence for fault in step.faults}
        row = entry = past = 0
        for run in step.runs:
            rows = slice(row, row := row + run.num_tokens)
            table = tables[entry : (entry := entry + run.num_blocks)]
            num_history = run.sampling.num_history if run.sampling else 0
            history = histories[past : (past := past + num_history)]
            if run.sequence in judged:
                continue
            judged.add(run.sequence)
            part = Part(run, rows, table, history)
            reason = self._objection(part, token_ids[rows], step)
            if reason is None:
                yield part
            else:
                self._fault(run, outcome, reason)

    def _objection(self, part: Part, token_ids: NDArray[np.int32], step: Step) -> str | None:
        """Why a run must not touch the cache; None if it may."""
        stage, run, table = self._stage, part.run, part.table
        end = run.start + run.num_tokens
        if end > stage.max_context:
            return f"position {end} is beyond the model's context of {stage.max_context}"
        if end > run.num_blocks * stage.block_tokens:
            return (
                f"{run.num_blocks} blocks of {stage.block_tokens} tokens do not hold position {end}"
            )
        if table.min() < 0 or table.max() >= self._num_blocks:
            return (
                f"the block table names blocks {table.min()} to {table.max()}, "
                f"the lease has {self._num_blocks}"
            )
        if token_ids.min() < 0 or token_ids.max() >= stage.vocab_size:
            return f"a token id is outside the vocabulary of {stage.vocab_size}"
        history = part.history
        if history.size and (history.min() < 0 or history.max() >= stage.vocab_size):
            return f"the history has a token id outside the vocabulary of {stage.vocab_size}"
        return None

    def _keep_finite(self, parts: list[Part], hidden: Tensor, outcome: Outcome) -> list[Part]:
        """The parts without NaN or infinity; the others become faults."""
        if _is_finite(hidden):  # one pass for all, as is true of nearly every step
            return parts
        kept = []
        for part in parts:
            rows = hidden[part.rows]
            if _is_finite(rows) or bool(torch.isfinite(rows).all()):
                kept.append(part)
            else:
                what = "NaN" if bool(torch.isnan(rows).any()) else "infinity"
                start, end = self._stage.start_layer, self._stage.end_layer
                reason = f"{what} in hidden states after layers {start}:{end}"
                self._fault(part.run, outcome, reason)
        return kept

    def _draw(self, parts: list[Part], hidden: Tensor, outcome: Outcome) -> None:
        drawing = [part for part in parts if part.run.sampling is not None]
        if not drawing:
            return
        logits = self._stage.logits(hidden[[part.rows.stop - 1 for part in drawing]]).to("cpu")
        values = logits.amax(dim=-1).tolist()  # NaN wins a maximum
        greedy_tokens = logits.argmax(dim=-1).tolist()
        for i, part in enumerate(drawing):
            sampling = part.run.sampling
            assert sampling is not None
            if not math.isfinite(values[i]):
                what = "NaN" if math.isnan(values[i]) else "infinity"
                self._fault(part.run, outcome, f"{what} in the logits")
            elif _is_plain_greedy(sampling):
                token = greedy_tokens[i]
                outcome.drawn.append(Drawn(sequence=part.run.sequence, token=token))
            else:
                self._draw_one(part, sampling, logits[i], outcome)

    def _draw_one(self, part: Part, sampling: Sampling, logits: Tensor, outcome: Outcome) -> None:
        history = torch.from_numpy(part.history.astype(np.int64)) if part.history.size else None
        try:
            token, logprob, top = draw(logits, sampling, history)
        except StepFailed as exc:
            self._fault(part.run, outcome, str(exc))
            return
        drawn = Drawn(sequence=part.run.sequence, token=token, logprob=logprob, top=top)
        outcome.drawn.append(drawn)

    def _fault(self, run: Run, outcome: Outcome, reason: str) -> None:
        reason = reason[:MAX_REASON_CHARS]
        outcome.faults.append(Fault(sequence=run.sequence, worker=self._worker, reason=reason))

    def _fault_all(self, step: Step, outcome: Outcome, reason: str) -> None:
        """Every sequence that nobody has judged yet; tokens drawn before the error do not count."""
        outcome.drawn.clear()
        judged = {fault.sequence for fault in (*step.faults, *outcome.faults)}
        for run in step.runs:
            if run.sequence not in judged:
                judged.add(run.sequence)
                self._fault(run, outcome, reason)


def _stage_run(part: Part) -> StageRun:
    run = part.run
    return StageRun(
        start=run.start,
        num_tokens=run.num_tokens,
        rope_length=run.rope_length,
        blocks=torch.from_numpy(part.table.astype(np.int64)),
    )


def _places(parts: list[Part]) -> Tensor:
    """The rows of some of a step's runs, (rows,) int64."""
    return torch.cat([torch.arange(part.rows.start, part.rows.stop) for part in parts])


def _is_finite(values: Tensor) -> bool:
    """False if any is NaN or infinite; also, rarely, if only their sum overflows."""
    return math.isfinite(values.sum(dtype=torch.float32).item())


def _is_plain_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0 and sampling.repetition_penalty == 1 and sampling.logprobs == 0


def _bytes_of(values: Tensor) -> memoryview:
    """The tensor's own memory; numpy has no bfloat16, so bits travel as integers."""
    if values.dtype != torch.float32:
        values = values.view(torch.int16)
    return values.contiguous().numpy().data.cast("B")


def _reason(error: Exception, step: Step) -> str:
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        num_tokens = sum(run.num_tokens for run in step.runs)
        return (
            f"out of memory in a step of {num_tokens} tokens of {len(step.runs)} sequences, "
            f"{free_cpu_bytes() // 10**6} MB are free: {text or 'allocation failed'}"
        )
    if isinstance(error, Error):
        return text
    return f"internal error: {type(error).__name__}: {text}"
