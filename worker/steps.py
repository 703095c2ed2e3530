"""Compute one step on a stage: payload in, hidden states or tokens out, faults beside them.

Runs on torch's thread. Knows the stage, the lease's KV blocks and the layout of a step's payload;
knows no link. A sequence that cannot be computed becomes a fault and the rest of the step goes on;
an error of the whole step becomes a fault of each of its sequences. Nothing is raised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from engine.attention import StageRun
from engine.sampling import draw
from engine.scoring import likelihoods, rows_at_once
from proto.codec import StepPayload, mask_words, score_bytes, step_payload
from proto.errors import Error, StepFailed
from proto.free_memory import free_cpu_bytes
from proto.messages import (
    MAX_REASON_CHARS,
    MAX_SCORE_BYTES,
    Drawn,
    Fault,
    Run,
    Sampling,
    Scored,
    Scoring,
    Step,
)
from worker.memory import is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from engine.kv import BlockCache
    from engine.lora_layers import Adapter
    from engine.stage import Stage
    from worker.adapters import HeldAdapter

INT32: Final = np.dtype("<i4")
FLOAT32: Final = np.dtype("<f4")
NO_SAMPLING: Final = Sampling()


@dataclass(frozen=True, slots=True)
class FloatBits:
    """How one float type looks as an unsigned integer: larger numbers, then infinity, then NaN.

    Judging bits is exact, and works the same for bfloat16, which numpy does not know.
    """

    dtype: torch.dtype
    same_size: torch.dtype  # that torch and numpy share
    unsigned: type[np.unsignedinteger]
    infinity: int
    magnitude: int  # all bits but the sign

    def of(self, values: Tensor) -> NDArray[np.unsignedinteger]:
        """The same memory, as integers."""
        return values.view(self.same_size).numpy().view(self.unsigned)

    def largest(self, bits: NDArray[np.unsignedinteger]) -> int:
        """The largest magnitude; `infinity` or more where some value is not finite."""
        return int((bits & self.magnitude).max())


FLOATS: Final = {
    "float32": FloatBits(torch.float32, torch.int32, np.uint32, 0x7F800000, 0x7FFFFFFF),
    "bfloat16": FloatBits(torch.bfloat16, torch.int16, np.uint16, 0x7F80, 0x7FFF),
    "float16": FloatBits(torch.float16, torch.int16, np.uint16, 0x7C00, 0x7FFF),
}


@dataclass(slots=True)
class Outcome:
    """What became of a step at this stage; `faults` are the new ones only."""

    hidden: memoryview | None = None  # (tokens, hidden_size) for the next stage
    drawn: list[Drawn] = field(default_factory=list)  # of the last stage
    scored: list[Scored] = field(default_factory=list)  # and
    scores: list[bytes] = field(default_factory=list)  # the rows of each
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """One run that can be computed, with its places in the step's payload."""

    run: Run
    rows: slice  # of token ids and hidden states
    token_ids: NDArray[np.int64]  # (num_tokens,)
    table: NDArray[np.int64]  # (num_blocks,)
    history: NDArray[np.int64]  # (num_history,)
    offset_tokens: NDArray[np.int64]  # (num_offsets,)
    offset_values: NDArray[np.float32]  # (num_offsets,)
    mask: NDArray[np.uint8]  # (num_mask_words * 4,), a bit a token
    adapter: Adapter | None


class StepComputer:
    """A stage and a lease's KV blocks, ready for step after step."""

    def __init__(
        self,
        stage: Stage,
        cache: BlockCache,
        num_blocks: int,
        worker: str,
        adapters: Mapping[int, HeldAdapter] | None = None,
    ) -> None:
        """
        Args:
            worker: HOST:PORT as the manager knows it; faults carry it.
            adapters: of the lease, by their number in runs; changes from step to step.
        """
        self._stage = stage
        self._cache = cache
        self._num_blocks = num_blocks
        self._worker = worker
        self._adapters = {} if adapters is None else adapters
        self._floats = FLOATS[stage.dtype_name]
        self._is_on_cpu = stage.device_name.startswith("cpu")

    def parse(self, step: Step, payload: memoryview) -> StepPayload:
        """Cut a payload into its parts.

        Raises:
            RemoteProtocolError: it is not of exactly the length that `step` announces.
        """
        return step_payload(step, payload, self._stage.hidden_size, self._floats.dtype.itemsize)

    def compute(self, step: Step, payload: StepPayload, *, is_last: bool) -> Outcome:
        """Run the stage's layers on the step; if `is_last`, draw its tokens as well.

        Args:
            payload: from `parse`; read, never written.
        """
        outcome = Outcome()
        try:
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
        token_ids = np.frombuffer(payload.token_ids, INT32).astype(np.int64)
        parts = self._parts(step, payload, token_ids, outcome)
        if not parts:
            return
        hidden = torch.frombuffer(payload.hidden, dtype=self._floats.dtype)
        hidden = hidden.view(len(token_ids), -1)
        ids = torch.from_numpy(token_ids)
        if len(parts) == len(step.runs):
            result = self._forward(ids, hidden, parts)
        else:
            places = _places(parts)
            result = torch.zeros_like(hidden)
            result[places] = self._forward(ids[places], hidden[places], parts)
        bits = self._floats.of(result)
        if self._floats.largest(bits) >= self._floats.infinity:
            parts = self._keep_finite(parts, bits, outcome)
        if is_last:
            parts = [part for part in parts if self._score(part, result, outcome)]
            self._draw(parts, result, outcome)
        else:
            outcome.hidden = bits.data.cast("B")

    def _forward(self, token_ids: Tensor, hidden: Tensor, parts: list[Part]) -> Tensor:
        runs = [
            StageRun(
                start=part.run.start,
                num_tokens=part.run.num_tokens,
                rope_length=part.run.rope_length,
                blocks=torch.from_numpy(part.table),
                adapter=part.adapter,
            )
            for part in parts
        ]
        result = self._stage.forward(token_ids, hidden, runs, self._cache)
        return (result if self._is_on_cpu else result.cpu()).contiguous()

    def _parts(
        self, step: Step, payload: StepPayload, token_ids: NDArray[np.int64], outcome: Outcome
    ) -> list[Part]:
        """The runs that nobody has judged yet and that may be computed."""
        tables = np.frombuffer(payload.tables, INT32).astype(np.int64)
        histories = np.frombuffer(payload.histories, INT32).astype(np.int64)
        offset_tokens = np.frombuffer(payload.offset_tokens, INT32).astype(np.int64)
        offset_values = np.frombuffer(payload.offset_values, FLOAT32)
        masks = np.frombuffer(payload.masks, np.uint8)
        doubtful = (
            not _is_below(token_ids, self._stage.vocab_size)
            or not _is_below(tables, self._num_blocks)
            or not _is_below(histories, self._stage.vocab_size)
            or not _is_below(offset_tokens, self._stage.vocab_size)
            or not np.isfinite(offset_values).all()
        )
        judged = {fault.sequence for fault in step.faults}
        seen: set[int] = set()
        parts: list[Part] = []
        row = entry = past = offset = mask = scores = 0
        for run in step.runs:
            sampling = run.sampling or NO_SAMPLING
            held = None if run.adapter is None else self._adapters.get(run.adapter)
            part = Part(
                run,
                slice(row, row + run.num_tokens),
                token_ids[row : (row := row + run.num_tokens)],
                tables[entry : (entry := entry + run.num_blocks)],
                histories[past : (past := past + sampling.num_history)],
                offset_tokens[offset : offset + sampling.num_offsets],
                offset_values[offset : (offset := offset + sampling.num_offsets)],
                masks[mask : (mask := mask + 4 * sampling.num_mask_words)],
                None if held is None else held.adapter,
            )
            if run.sequence in judged:
                continue
            reason = self._misplaced(run)
            if held is None and run.adapter is not None:
                reason = f"its adapter (number {run.adapter}) is not in use in this lease"
            if reason is None and doubtful:
                reason = self._out_of_range(part)
            if reason is None and run.scoring is not None:
                reason = self._unscorable(run, run.scoring, scores)
                if reason is None:
                    scores += _num_score_bytes(run.scoring)
            if run.sequence in seen:
                parts = [other for other in parts if other.run.sequence != run.sequence]
                reason = "it is in the step twice"
            seen.add(run.sequence)
            if reason is None:
                parts.append(part)
            else:
                judged.add(run.sequence)
                self._fault(run, outcome, reason)
        return parts

    def _misplaced(self, run: Run) -> str | None:
        """Why a run's positions cannot be; None if they can."""
        stage, end = self._stage, run.start + run.num_tokens
        if end > stage.max_context:
            return f"position {end} is beyond the model's context of {stage.max_context}"
        if end > run.num_blocks * stage.block_tokens:
            return (
                f"{run.num_blocks} blocks of {stage.block_tokens} tokens do not hold position {end}"
            )
        if run.rope_length > stage.max_context:
            return (
                f"its rotary length {run.rope_length} is beyond the model's context of "
                f"{stage.max_context}"
            )
        sampling = run.sampling or NO_SAMPLING
        if sampling.num_mask_words not in (0, mask_words(stage.vocab_size)):
            return (
                f"its mask has {sampling.num_mask_words} words, a vocabulary of "
                f"{stage.vocab_size} takes {mask_words(stage.vocab_size)}"
            )
        return None

    def _unscorable(self, run: Run, scoring: Scoring, scores_before: int) -> str | None:
        """Why rows of a run have no score to give; None if they have.

        Args:
            scores_before: bytes of the answer that other runs of the step take.
        """
        end, vocab_size = scoring.first_row + scoring.num_rows, self._stage.vocab_size
        if end > run.num_tokens:
            return f"row {end - 1} of it is to be scored, it has {run.num_tokens}"
        if (scoring.next_token is not None) != (end == run.num_tokens):
            which = "no token" if scoring.next_token is None else "a token"
            return f"{which} stands behind its scored rows, which end at {end} of {run.num_tokens}"
        if scoring.next_token is not None and scoring.next_token >= vocab_size:
            return f"the token behind its scored rows is outside the vocabulary of {vocab_size}"
        if scoring.top > vocab_size:
            return f"the {scoring.top} likeliest of a vocabulary of {vocab_size} are wanted"
        step_bytes = scores_before + _num_score_bytes(scoring)
        if step_bytes > MAX_SCORE_BYTES:
            return (
                f"the log-probabilities of this step come to {step_bytes} bytes, an answer holds "
                f"{MAX_SCORE_BYTES}"
            )
        return None

    def _out_of_range(self, part: Part) -> str | None:
        """Which of a run's numbers is none of ours; None if all are."""
        vocab_size, table = self._stage.vocab_size, part.table
        if not _is_below(table, self._num_blocks):
            return (
                f"the block table names blocks {table.min()} to {table.max()}, "
                f"the lease has {self._num_blocks}"
            )
        if not _is_below(part.token_ids, vocab_size):
            return f"a token id is outside the vocabulary of {vocab_size}"
        if not _is_below(part.history, vocab_size):
            return f"the history has a token id outside the vocabulary of {vocab_size}"
        if not _is_below(part.offset_tokens, vocab_size):
            return f"an offset has a token id outside the vocabulary of {vocab_size}"
        if not np.isfinite(part.offset_values).all():
            return "an offset is no finite number"
        return None

    def _keep_finite(
        self, parts: list[Part], bits: NDArray[np.unsignedinteger], outcome: Outcome
    ) -> list[Part]:
        """The parts without NaN or infinity; the others become faults."""
        kept = []
        for part in parts:
            largest = self._floats.largest(bits[part.rows])
            if largest < self._floats.infinity:
                kept.append(part)
            else:
                what = "NaN" if largest > self._floats.infinity else "infinity"
                start, end = self._stage.start_layer, self._stage.end_layer
                reason = f"{what} in hidden states after layers {start}:{end}"
                self._fault(part.run, outcome, reason)
        return kept

    def _score(self, part: Part, hidden: Tensor, outcome: Outcome) -> bool:
        """How likely a run's next tokens are, where that is asked; False: it is a fault now."""
        scoring = part.run.scoring
        if scoring is None:
            return True
        first = part.rows.start + scoring.first_row
        rows = hidden[first : first + scoring.num_rows]
        following = part.token_ids[scoring.first_row + 1 :][: scoring.num_rows]
        if scoring.next_token is not None:
            following = np.append(following, scoring.next_token)
        scores = []
        piece = rows_at_once(self._stage.vocab_size)
        for at in range(0, scoring.num_rows, piece):
            some = rows[at : at + piece].to(self._stage.device)
            logits = self._stage.logits(some, [part.adapter] * len(some))
            try:
                scores.append(
                    likelihoods(logits, torch.from_numpy(following[at : at + piece]), scoring.top)
                )
            except StepFailed as exc:
                self._fault(part.run, outcome, str(exc))
                return False
        outcome.scored.append(
            Scored(
                sequence=part.run.sequence,
                start=part.run.start + scoring.first_row + 1,
                num_rows=scoring.num_rows,
                top=scoring.top,
            )
        )
        outcome.scores.append(b"".join(scores))
        return True

    def _draw(self, parts: list[Part], hidden: Tensor, outcome: Outcome) -> None:
        drawing = [part for part in parts if part.run.sampling is not None]
        if not drawing:
            return
        rows = hidden[[part.rows.stop - 1 for part in drawing]]
        adapters = [part.adapter for part in drawing]
        logits = self._stage.logits(rows.to(self._stage.device), adapters)
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
                self._draw_one(part, sampling, logits[i].cpu(), outcome)

    def _draw_one(self, part: Part, sampling: Sampling, logits: Tensor, outcome: Outcome) -> None:
        history = torch.from_numpy(part.history) if part.history.size else None
        offsets = allowed = None
        if part.offset_tokens.size:
            values = part.offset_values.astype(np.float32)  # a copy that torch may call its own
            offsets = (torch.from_numpy(part.offset_tokens), torch.from_numpy(values))
        if part.mask.size:
            bits = np.unpackbits(part.mask, count=self._stage.vocab_size, bitorder="little")
            allowed = torch.from_numpy(bits).bool()
        try:
            token, logprob, top = draw(logits, sampling, history, offsets, allowed)
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
        for made in (outcome.drawn, outcome.scored, outcome.scores):
            made.clear()
        judged = {fault.sequence for fault in (*step.faults, *outcome.faults)}
        for run in step.runs:
            if run.sequence not in judged:
                judged.add(run.sequence)
                self._fault(run, outcome, reason)


def _places(parts: list[Part]) -> Tensor:
    """The rows of some of a step's runs, (rows,) int64."""
    return torch.cat([torch.arange(part.rows.start, part.rows.stop) for part in parts])


def _is_below(numbers: NDArray[np.int64], end: int) -> bool:
    """Whether all are in [0, end); a negative one is a huge one when its sign is ignored."""
    return not numbers.size or int(numbers.view(np.uint64).max()) < end


def _num_score_bytes(scoring: Scoring) -> int:
    return scoring.num_rows * score_bytes(scoring.top)


def _is_plain_greedy(sampling: Sampling) -> bool:
    return (
        sampling.temperature == 0
        and sampling.repetition_penalty == 1
        and sampling.logprobs == 0
        and not sampling.num_offsets
        and not sampling.num_mask_words
    )


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
