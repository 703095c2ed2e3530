"""The shell around a scheduler in tests: feeds a toy chain and keeps what every sequence got.

It checks from outside, by the commands alone, what a worker and a user rely on.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from engine.requests import (
    Cancelled,
    Command,
    Event,
    Finished,
    Generated,
    PlannedRun,
    Refused,
    Request,
    RunStep,
    Scored,
    StepReturned,
    Stopped,
    Submitted,
    TopologyLost,
    TopologyRestored,
)
from engine.scheduler import Scheduler
from tests.support.toy_chain import ToyChain, ToyModel, scores_alone, unbatched


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a scheduler is set up."""

    num_stages: int = 2
    num_blocks: int = 16
    block_tokens: int = 4
    token_budget: int = 24
    max_context: int = 48
    max_running: int = 8
    num_state_slots: int = 0
    share_prefixes: bool = True
    min_chunk_tokens: int = 4


@dataclass(slots=True)
class Story:
    """What one request was told so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    scores: list[int] = field(default_factory=list)  # of its prompt's tokens, from the second on
    finished: Finished | None = None
    refused: Refused | None = None
    issued: int = 0  # positions that were handed to a step
    began_in: int = 0  # the step in which its KV was begun last; what earlier ones draw is void

    @property
    def is_over(self) -> bool:
        return self.finished is not None or self.refused is not None


class ToyShell:
    """Runs requests; `stories` tells what became of each."""

    def __init__(self, model: ToyModel, limits: Limits, rng: random.Random) -> None:
        self.model, self.limits = model, limits
        self.stories: dict[int, Story] = {}
        self.faults: set[int] = set()
        self.ended: set[int] = set()  # by the user
        self.restarts = 0  # of sequences whose KV is computed anew
        self.log: list[tuple[Event, list[Command]]] = []
        self.scheduler = Scheduler(
            limits.num_stages,
            limits.num_blocks,
            limits.block_tokens,
            max_context=limits.max_context,
            token_budget=limits.token_budget,
            rope_switch=model.rope_switch,
            max_running=limits.max_running,
            num_state_slots=limits.num_state_slots,
            share_prefixes=limits.share_prefixes,
            min_chunk_tokens=limits.min_chunk_tokens,
        )
        self._rng = rng
        self._num_stages, self._num_blocks = limits.num_stages, limits.num_blocks
        self._chain: ToyChain | None = self._new_chain()
        self._in_flight: deque[RunStep] = deque()
        self._returned: list[RunStep] = []  # some of those that came back from this chain
        self._late: list[RunStep] = []  # of chains that are no more
        self._is_silent = False  # the chain broke, and nobody has noticed yet
        self._next_step = 0

    # --- what a user does --------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self.stories[request.sequence] = Story(request)
        self.handle(Submitted(request))

    def cancel(self, sequence: int) -> None:
        self.handle(Cancelled(sequence))
        self._expect_over(sequence, "cancelled")

    def stop(self, sequence: int) -> None:
        self.ended.add(sequence)
        self.handle(Stopped(sequence))
        self._expect_over(sequence, "stop")

    @property
    def live(self) -> list[int]:
        return [number for number, story in self.stories.items() if not story.is_over]

    # --- what workers do ---------------------------------------------------------------------

    @property
    def busy_stages(self) -> list[int]:
        return [] if self._chain is None or self._is_silent else self._chain.busy_stages

    def advance(self, stage: int, fault_in: int | None = None) -> None:
        assert self._chain is not None
        returned = self._chain.advance(stage, fault_in)
        if returned is not None:
            step = self._in_flight.popleft()
            if self._rng.random() < 0.05:
                self._returned.append(step)
            self.faults |= returned.faults.keys()
            drawn = returned.tokens.keys() & set(self.live)
            commands = self.handle(returned)
            if not self.faults:  # then nothing that was drawn is lost
                kept = [it.sequence for it in commands if isinstance(it, Generated | Finished)]
                assert drawn <= set(kept)

    def break_chain(self) -> None:
        """Nothing comes back from now on; what is issued goes nowhere."""
        self._is_silent = True

    def lose_chain(self) -> None:
        self._leave_chain()
        self._chain = None
        self.handle(TopologyLost())

    def restore_chain(self, num_stages: int, num_blocks: int) -> None:
        self._leave_chain()
        self._num_stages, self._num_blocks = num_stages, num_blocks
        self._chain, self._is_silent = self._new_chain(), False
        self.handle(TopologyRestored(num_blocks, num_stages))

    def _leave_chain(self) -> None:
        self._late += [*self._in_flight, *self._returned]
        self._in_flight.clear()
        self._returned.clear()

    def deliver_late(self) -> None:
        """A step of a chain that is no more comes back after all, in any order, or again."""
        if self._late:
            step = self._rng.choice(self._late)
            if self._rng.random() < 0.8:
                self._late.remove(step)
            tokens = {run.sequence: 1 for run in step.runs}
            late = StepReturned(step.step, tokens, {}, scored=frozenset(tokens))
            assert not any(
                isinstance(command, Generated | Scored | Finished) for command in self.handle(late)
            )

    def run_dry(self) -> None:
        """Let the workers go on until nobody lives; bounded, so that a livelock shows."""
        if self._chain is None or self._is_silent:
            self.restore_chain(self._num_stages, self._num_blocks)
        for _ in range(200_000):
            if not self.live:
                break
            self.advance(self._rng.choice(self.busy_stages))
        assert not self.live

    # --- what is checked ---------------------------------------------------------------------

    def handle(self, event: Event) -> list[Command]:
        commands = self.scheduler.handle(event)
        self.log.append((event, commands))
        for command in commands:
            match command:
                case RunStep():
                    self._issue(command)
                case Generated():
                    story = self._live_story(command.sequence)
                    assert command.draw == len(story.tokens)
                    story.tokens.append(command.token)
                case Scored():
                    self._take_scores(command)
                case Finished():
                    self._live_story(command.sequence).finished = command
                case Refused():
                    self._live_story(command.sequence).refused = command
        self.scheduler.check_invariants()
        return commands

    def check_stories(self) -> None:
        for number, story in self.stories.items():
            if story.refused is None:
                self._check_story(number, story)

    def _check_story(self, number: int, story: Story) -> None:
        """However it was batched: what it generated alone, or the start of that."""
        expected = unbatched(self.model, story.request, self.limits.max_context)
        got, finished = list(story.tokens), story.finished
        assert finished is not None
        scores = scores_alone(self.model, story.request) if story.request.scores_prompt else []
        assert story.scores == scores[: len(story.scores)], (number, story)
        if story.tokens or (finished.reason in ("stop", "length") and number not in self.ended):
            assert len(story.scores) == len(scores)
        if finished.eos_token is not None:
            assert finished.reason == "stop" and finished.eos_token in story.request.eos
            got.append(finished.eos_token)
        assert got == expected[: len(got)], (number, story)
        if finished.eos_token is not None or (finished.reason == "length" and not finished.detail):
            assert got == expected
        elif "context" in finished.detail:
            assert len(story.request.prompt) + len(got) == self.limits.max_context
        elif finished.reason == "error":
            assert number in self.faults and finished.detail

    def _take_scores(self, command: Scored) -> None:
        assert self._chain is not None
        story = self._live_story(command.sequence)
        assert story.request.scores_prompt and not story.tokens
        assert command.start == 1 + len(story.scores)  # none is lost, none comes twice
        scores = self._chain.scores[command.sequence]
        assert command.num_tokens == len(scores)
        story.scores += scores

    def _issue(self, step: RunStep) -> None:
        assert self._chain is not None, "a step was issued while there is no chain"
        assert step.step == self._next_step and step.epoch == self.scheduler.epoch
        self._next_step += 1
        assert 1 <= step.num_tokens <= self.limits.token_budget
        for run in step.runs:
            self._check_run(step.step, run)
        counts = Counter(run.sequence for run in step.runs)
        assert max(counts.values()) == 1
        self._in_flight.append(step)
        assert len(self._in_flight) <= self._num_stages + 1
        draws = Counter(
            run.sequence
            for step in self._in_flight
            for run in step.runs
            if run.draws and run.sequence in self.live
            if step.step >= self.stories[run.sequence].began_in
        )
        assert max(draws.values(), default=0) <= 1
        self._chain.issue(step)

    def _check_run(self, step: int, run: PlannedRun) -> None:
        story = self._live_story(run.sequence)
        text = [*story.request.prompt, *story.tokens]
        end = run.start + len(run.tokens)
        assert list(run.tokens) == text[run.start : end] and run.tokens
        assert run.draws == (end == len(text) and story.request.max_new_tokens > 0)
        assert run.draw == len(story.tokens)
        assert len(run.blocks) == -(-end // self.limits.block_tokens)
        assert set(run.blocks) <= set(range(self._num_blocks))
        assert (run.state_slot is not None) == (self.limits.num_state_slots > 0)
        if run.start < story.issued:
            self.restarts += 1
            story.began_in = step
        story.issued = end

    def _live_story(self, sequence: int) -> Story:
        story = self.stories[sequence]
        assert not story.is_over, f"{sequence} was heard of after its end"
        return story

    def _expect_over(self, sequence: int, reason: str) -> None:
        finished = self.stories[sequence].finished
        assert finished is not None and finished.reason == reason

    def _new_chain(self) -> ToyChain:
        return ToyChain(
            self.model, self._num_stages, self._num_blocks, self.limits.block_tokens, self._rng
        )
