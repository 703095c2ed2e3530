"""Between requests and steps: feeds the scheduler with events and turns its commands into acts.

Owns the live requests. Knows the step writer that sends, not the links behind it; time is the
monotonic clock. Without a chain (`suspend`) requests wait, until there is one again (`resume`) or
until nobody waits any longer for one (`lose`); which of these is `manager.recovery`'s to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol

from engine.requests import (
    Cancelled,
    Command,
    Event,
    Finished,
    Generated,
    Refused,
    Request,
    RunStep,
    Scored,
    Stats,
    StepReturned,
    Stopped,
    Submitted,
    TopologyLost,
    TopologyRestored,
)
from engine.scheduler import Scheduler
from manager.adapter_book import AdapterUse
from manager.encoding import Prompt
from manager.generation import GenerationOptions
from manager.pace import AT_ONCE, Pace
from manager.sequences import ActiveSequence, Constraint
from manager.steps import StepWriter
from manager.text import NOTHING_SHOWN, Vocabulary
from proto.codec import step_scores
from proto.errors import Error, RequestRefused, UsageError
from proto.messages import Drawn, StepDone, StepReport


class Trace(Protocol):
    """Somebody who writes down when each step was where. Times are `time.monotonic()`."""

    def step_issued(self, step: int, at_s: float, num_tokens: int) -> None:
        """A step goes to the first worker now."""

    def step_returned(self, step: int, at_s: float, stage_s: Sequence[float]) -> None:
        """Its tokens are here; `stage_s` are the stages' compute seconds, in order."""

    def report(self, worker: str, report: StepReport, clock_offset_s: float) -> None:
        """When a step passed the worker at this address, by its own clock: ours plus the offset."""

    def close(self) -> None:
        """Nothing follows."""


@dataclass(frozen=True, slots=True)
class IssuedStep:
    """A step that has not returned yet."""

    command: RunStep
    at_s: float


@dataclass(frozen=True, slots=True)
class Returned:
    """What a step brought, by sequence; which of it counts is the scheduler's to say."""

    drawn: dict[int, Drawn]
    scores: dict[int, memoryview]  # rows of log-probabilities


NOTHING: Final = Returned({}, {})


class Dispatcher:
    """The live requests of one pipeline."""

    def __init__(
        self,
        scheduler: Scheduler,
        writer: StepWriter,
        vocabulary: Vocabulary,
        *,
        eos: frozenset[int],
        prompt_salt: Callable[[int], int | str],
        trace: Trace | None = None,
        on_event: Callable[[Event, Sequence[Command]], None] | None = None,
    ) -> None:
        self._scheduler, self._writer = scheduler, writer
        self._vocabulary, self._eos, self._prompt_salt = vocabulary, eos, prompt_salt
        self._trace, self._on_event = trace, on_event
        self._numbers = count()
        self._active: dict[int, ActiveSequence] = {}
        self._issued: dict[int, IssuedStep] = {}
        self._refusals: dict[int, str] = {}
        self._submitting: int | None = None
        self._lost: Error | None = None

    def stats(self) -> Stats:
        """What the scheduler holds right now."""
        return self._scheduler.stats()

    @property
    def lost(self) -> Error | None:
        """Why no request can run now, where none waits for that to change."""
        return self._lost

    @property
    def epoch(self) -> int:
        """Number of the chain that steps are issued for."""
        return self._scheduler.epoch

    @property
    def oldest_step_s(self) -> float | None:
        """When the step was issued that is on its way for longest; None: there is none."""
        return min((issued.at_s for issued in self._issued.values()), default=None)

    @property
    def longest_tokens(self) -> int:
        """Of the requests that are not over, prompt and all that may be generated."""
        sizes = (
            len(it.prompt.token_ids) + it.options.max_new_tokens for it in self._active.values()
        )
        return max(sizes, default=1)

    @property
    def num_active(self) -> int:
        """Requests that are not over."""
        return len(self._active)

    def submit(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        on_prefill: Callable[[int, int], None] | None = None,
        adapter: AdapterUse | None = None,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] = NOTHING_SHOWN,
        pace: Pace = AT_ONCE,
    ) -> ActiveSequence:
        """Start a request; its pieces come by themselves.

        Args:
            adapter: that all workers know of; the caller's until the request is over.
            on_prefill: called with (prompt tokens computed, prompt tokens) while a prompt is read.
            constraint: which tokens may be drawn; nobody else's.
            shown: special tokens that have a text here, and that text.
            pace: how often whoever reads it is woken.
        Raises:
            RequestRefused: it can never run; says the numbers.
            WorkerLost: a worker went away before.
        """
        if self._lost is not None:
            raise self._lost
        number = next(self._numbers)
        sequence = ActiveSequence(
            number,
            prompt,
            options,
            self._vocabulary,
            time.monotonic(),
            None if adapter is None else adapter.number,
            constraint,
            shown,
            pace,
        )
        sequence.on_prefill = on_prefill
        self._active[number] = sequence
        request = Request(
            sequence=number,
            prompt=prompt.token_ids,
            max_new_tokens=options.max_new_tokens,
            eos=(frozenset() if options.ignore_eos else self._eos).union(options.stop_token_ids),
            prompt_salt=self._salt(len(prompt.token_ids), adapter),
            scores_prompt=options.prompt_logprobs is not None,
        )
        self._submitting = number
        self._apply(Submitted(request))
        self._submitting = None
        refusal = self._refusals.pop(number, None)
        if refusal is not None:
            raise RequestRefused(refusal)
        return sequence

    def cancel(self, sequence: ActiveSequence) -> None:
        """Nobody waits for it any more; does nothing when it is over."""
        if sequence.number in self._active:
            self._apply(Cancelled(sequence.number))

    def step_done(self, done: StepDone, payload: memoryview, epoch: int) -> None:
        """The last worker sent what was drawn, and how likely tokens of prompts are.

        Raises:
            RemoteProtocolError: the payload is not as the message says.
        """
        issued = self._issued.get(done.step)
        if issued is None or epoch != self.epoch:
            return  # of a chain that is no more
        scores = step_scores(done, payload)
        del self._issued[done.step]
        now_s = time.monotonic()
        if self._trace is not None:
            self._trace.step_returned(done.step, now_s, done.compute_s)
        self._tell_prefill(issued.command)
        event = StepReturned(
            step=done.step,
            tokens={drawn.sequence: drawn.token for drawn in done.drawn},
            faults=self._faults(done),
            stage_s=tuple(done.compute_s),
            elapsed_s=now_s - issued.at_s,
            scored=self._as_asked(issued.command, done),
        )
        self._apply(event, Returned({drawn.sequence: drawn for drawn in done.drawn}, scores))

    def _faults(self, done: StepDone) -> dict[int, str]:
        """Why sequences could not be computed, or what was drawn for them is none of our tokens."""
        end = self._writer.vocab_size
        faults = {
            drawn.sequence: f"the last worker drew a token that the vocabulary of {end} has not"
            for drawn in done.drawn
            if drawn.token >= end or any(token >= end for token, _ in drawn.top)
        }
        return faults | {f.sequence: f"worker {f.worker}: {f.reason}" for f in done.faults}

    def suspend(self) -> int:
        """The chain is no more: requests wait. The epoch that the next chain is to have."""
        self._issued.clear()
        self._apply(TopologyLost())
        return self.epoch

    def resume(self, *, num_blocks: int, num_stages: int) -> None:
        """There is a chain of this epoch, with empty KV: everything is computed anew on it."""
        self._lost = None
        self._apply(TopologyRestored(num_blocks=num_blocks, num_stages=num_stages))

    def lose(self, error: Error) -> None:
        """No chain came in time: every request ends here, with the text that it has."""
        self._lost = error
        self.suspend()
        self._end_active("error", str(error))

    def end_all(self, reason: str) -> None:
        """The pipeline is being closed: whoever still waits gets the text so far."""
        self._lost = self._lost or UsageError(f"{reason}: no request can run.")
        self._end_active("cancelled", reason)

    # --- inside ------------------------------------------------------------------------------

    def _salt(self, prompt_tokens: int, adapter: AdapterUse | None) -> int | str:
        """Prompts share their beginnings where model and adapter are the same, by content."""
        salt = self._prompt_salt(prompt_tokens)
        return salt if adapter is None else f"{adapter.fingerprint} {salt}"

    def _end_active(self, reason: str, error: str) -> None:
        now_s = time.monotonic()
        for number, sequence in tuple(self._active.items()):
            sequence.finish(reason, error, now_s=now_s)
            self._apply(Cancelled(number))

    def _as_asked(self, command: RunStep, done: StepDone) -> frozenset[int]:
        """Sequences that have exactly the scores that the step asked for."""
        if not done.scored:
            return frozenset()
        asked = {
            run.sequence: (run.start + run.scoring.first_row + 1, run.scoring.num_rows)
            for run in command.runs
            if run.scoring is not None
        }
        return frozenset(
            it.sequence
            for it in done.scored
            if asked.get(it.sequence) == (it.start, it.num_rows)
            and (sequence := self._active.get(it.sequence)) is not None
            and sequence.options.prompt_logprobs == it.top
        )

    def _apply(self, event: Event, returned: Returned = NOTHING) -> None:
        """Feed one event and do what comes of it; stop texts seen on the way are events again."""
        stopped: list[int] = []
        commands = self._scheduler.handle(event)
        if self._on_event is not None:
            self._on_event(event, commands)
        for command in commands:
            match command:
                case RunStep():
                    self._issue(command)
                case Generated(sequence=number, token=token):
                    if self._take(number, token, returned.drawn):
                        stopped.append(number)
                case Scored(sequence=number, num_tokens=num_tokens):
                    if number in self._active:
                        rows = bytes(returned.scores[number])
                        self._active[number].scores_came(num_tokens, rows)
                case Finished():
                    self._finish(command, returned.drawn)
                case Refused(sequence=number, reason=reason):
                    self._refuse(number, reason)
        for number in stopped:
            if number in self._active:
                self._apply(Stopped(number))

    def _issue(self, command: RunStep) -> None:
        now_s = time.monotonic()
        self._issued[command.step] = IssuedStep(command, now_s)
        if self._trace is not None:
            self._trace.step_issued(command.step, now_s, command.num_tokens)
        self._writer.write(command, self._active)

    def _refuse(self, number: int, reason: str) -> None:
        """At once, to whoever submits it; or after a recovery, to whoever reads it."""
        sequence = self._active.pop(number, None)
        if number == self._submitting:
            self._refusals[number] = reason
        elif sequence is not None:
            sequence.finish("error", reason, now_s=time.monotonic())

    def _take(self, number: int, token: int, drawn: dict[int, Drawn]) -> bool:
        sequence = self._active.get(number)
        if sequence is None:
            return False
        return sequence.token_came(token, drawn.get(number), time.monotonic())

    def _finish(self, finished: Finished, drawn: dict[int, Drawn]) -> None:
        sequence = self._active.pop(finished.sequence, None)
        if sequence is None:
            return
        now_s = time.monotonic()
        if finished.eos_token is not None:
            sequence.end_token_came(finished.eos_token, drawn.get(sequence.number), now_s)
        error, detail = None, finished.detail
        if finished.reason == "error":
            error, detail = finished.detail or "the request failed", ""
        sequence.finish(finished.reason, error, detail, now_s=now_s)

    def _tell_prefill(self, command: RunStep) -> None:
        for run in command.runs:
            sequence = self._active.get(run.sequence)
            if sequence is not None and sequence.on_prefill is not None:
                total = len(sequence.prompt.token_ids)
                done = run.start + len(run.tokens)
                if done <= total:
                    sequence.on_prefill(done, total)
