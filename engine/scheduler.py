"""Which requests run next: events in, commands out.

A pure state machine. Time, sockets and text are the shell's: it turns commands into frames and
what comes back into events, and a log of its events replays any fault. `engine.roster` decides
who holds what, `engine.batching` what goes into a step, `engine.pacing` over how many steps the
decoding sequences spread; here stands what each event means for a sequence.

Words of state: a sequence waits, or runs (it holds blocks), or is over. A step is in flight from
`RunStep` to `StepReturned`. An epoch ends with `TopologyLost`; from then on nothing is issued
until `TopologyRestored`, and every sequence is computed anew, in the same order, with the same
draws.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from engine.batching import Batch, Batcher, IssuedRun
from engine.blocks import BlockPool
from engine.pacing import Pacer
from engine.requests import (
    Cancelled,
    Command,
    Event,
    Finished,
    Generated,
    PlannedRun,
    Reason,
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
from engine.roster import Roster, Sequence
from proto.errors import RemoteProtocolError

__all__ = [
    "Cancelled",
    "Command",
    "Event",
    "Finished",
    "Generated",
    "PlannedRun",
    "Refused",
    "Request",
    "RunStep",
    "Scheduler",
    "Scored",
    "Stats",
    "StepReturned",
    "Stopped",
    "Submitted",
    "TopologyLost",
    "TopologyRestored",
]


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    step: int
    batch: Batch
    is_calm: bool  # neither it nor anything before it in the pipeline carries a prompt


class Scheduler:
    """Continuous batching over a chain of stages.

    Args:
        num_stages: P.
        num_blocks: KV blocks that every worker leased to this manager.
        token_budget: most tokens in one step.
        max_context: most tokens of one sequence, prompt and generated together.
        rope_switch: length past which the model wants other rotary tables for all positions
            (LongRoPE's original context length); None where there is no such length.
        max_running: most sequences that hold blocks at the same time.
        num_state_slots: places for state of fixed size; 0 where the model keeps none. With
            them prefixes are not shared: the state at a prefix's end is not in its blocks.
        max_steps_in_flight: None: one more than stages.
        min_chunk_tokens: a prompt is not cut into pieces smaller than this to fill the stages.
    """

    def __init__(
        self,
        num_stages: int,
        num_blocks: int,
        block_tokens: int,
        *,
        max_context: int,
        token_budget: int = 512,
        rope_switch: int | None = None,
        max_running: int = 256,
        num_state_slots: int = 0,
        max_steps_in_flight: int | None = None,
        share_prefixes: bool = True,
        min_chunk_tokens: int = 32,
    ) -> None:
        self._block_tokens = block_tokens
        self._token_budget = token_budget
        self._max_context = max_context
        self._rope_switch = rope_switch
        self._max_steps_wanted = max_steps_in_flight
        self._min_chunk_tokens = min_chunk_tokens
        self._roster = Roster(
            BlockPool(num_blocks, block_tokens),
            max_running=max_running,
            num_state_slots=num_state_slots,
            max_context=max_context,
            rope_switch=rope_switch,
            share_prefixes=share_prefixes and num_state_slots == 0,
        )
        self._live: dict[int, Sequence] = {}
        self._in_flight: deque[_StepInFlight] = deque()
        self._epoch = 0
        self._next_step = 0
        self._first_step_of_epoch = 0
        self._next_arrival = 0
        self._set_stages(num_stages)
        self._is_whole = True

    def handle(self, event: Event) -> list[Command]:
        """Apply one event and say what must happen next, in this order."""
        commands: list[Command]
        match event:
            case Submitted():
                commands = self._submit(event.request)
            case StepReturned():
                commands = self._take_back(event)
            case Cancelled():
                commands = self._end_if_live(event.sequence, "cancelled")
            case Stopped():
                commands = self._end_if_live(event.sequence, "stop")
            case TopologyLost():
                commands = self._lose_topology()
            case _:  # TopologyRestored: the only one left, as the type checker confirms
                commands = self._restore_topology(event.num_blocks, event.num_stages)
        commands.extend(self._issue_steps())
        return commands

    @property
    def epoch(self) -> int:
        return self._epoch

    def progress(self, sequence: int) -> tuple[int, int] | None:
        """(tokens prefilled and returned, tokens to prefill); None when it is not live."""
        live = self._live.get(sequence)
        if live is None:
            return None
        total = live.prefill_end if live.running else len(live.tokens)
        return min(live.returned, total), total

    def stats(self) -> Stats:
        return Stats(
            epoch=self._epoch,
            waiting=self._roster.num_waiting,
            running=len(self._roster.running),
            steps_in_flight=len(self._in_flight),
            decode_groups=self._pacer.groups,
            blocks_total=self._roster.pool.num_blocks,
            blocks_free=self._roster.pool.num_available,
            preemptions=self._roster.preemptions,
            shared_tokens=self._roster.shared_tokens,
        )

    # --- requests ----------------------------------------------------------------------------

    def _submit(self, request: Request) -> list[Command]:
        assert request.sequence not in self._live, request.sequence
        refusal = self._why_never(request)
        if refusal is not None:
            return [Refused(request.sequence, refusal)]
        sequence = Sequence(
            request, self._next_arrival, list(request.prompt), rope_base=len(request.prompt)
        )
        self._next_arrival += 1
        self._live[request.sequence] = sequence
        self._roster.add(sequence)
        return []

    def _why_never(self, request: Request) -> str | None:
        prompt_tokens = len(request.prompt)
        if prompt_tokens == 0:
            return (
                "the prompt has 0 tokens, a model needs at least 1: write something to go on from"
            )
        least = 0 if request.scores_prompt else 1
        if request.max_new_tokens < least:
            return f"max_new_tokens is {request.max_new_tokens}, it must be at least {least}"
        room = self._max_context - min(1, request.max_new_tokens)
        if prompt_tokens > room:
            return (
                f"the prompt has {prompt_tokens} tokens, the model's context of "
                f"{self._max_context} leaves room for {room}: shorten the prompt"
            )
        if self._is_whole and _least_tokens(request) > self._roster.pool.capacity_tokens:
            return self._why_too_large_for_kv(prompt_tokens)
        return None  # without a chain nobody knows the KV yet: checked when it comes

    def _why_too_large_for_kv(self, prompt_tokens: int) -> str:
        return (
            f"the prompt has {prompt_tokens} tokens, the workers' KV can hold "
            f"{self._roster.pool.capacity_tokens}: start them with a larger --kv-memory "
            "or shorten the prompt"
        )

    def _end_if_live(self, sequence: int, reason: Reason) -> list[Command]:
        """From outside, at any time; of one that is over already there is nothing to say."""
        live = self._live.get(sequence)
        return [] if live is None else [self._end(live, reason)]

    def _end(
        self, sequence: Sequence, reason: Reason, detail: str = "", eos_token: int | None = None
    ) -> Finished:
        # Its blocks are free at once, in flight or not: the roster's first page says why.
        self._roster.remove(sequence)
        del self._live[sequence.request.sequence]
        return Finished(sequence.request.sequence, reason, detail, eos_token)

    # --- steps -------------------------------------------------------------------------------

    def _issue_steps(self) -> list[RunStep]:
        steps: list[RunStep] = []
        while self._is_whole and len(self._in_flight) < self._max_steps:
            decodes = [it.batch.num_decodes for it in self._in_flight if it.batch.num_decodes]
            batch = self._batcher.compose(self._pacer.groups, decodes)
            if batch is None:
                break
            is_calm = batch.only_decodes and all(it.batch.only_decodes for it in self._in_flight)
            self._in_flight.append(_StepInFlight(self._next_step, batch, is_calm))
            runs = tuple(run.planned for run in batch.runs)
            steps.append(RunStep(self._next_step, self._epoch, runs))
            self._next_step += 1
        return steps

    def _take_back(self, event: StepReturned) -> list[Command]:
        if event.step < self._first_step_of_epoch:
            return []  # of a chain that is no more
        if not self._in_flight or self._in_flight[0].step != event.step:
            expected = f"step {self._in_flight[0].step}" if self._in_flight else "none"
            raise RemoteProtocolError(
                f"step {event.step} came back where {expected} was due: steps return in order"
            )
        step = self._in_flight.popleft()
        if step.is_calm:
            self._pacer.observe(event.stage_s, event.elapsed_s)
        commands: list[Command] = []
        for run in step.batch.runs:
            commands += self._take_back_run(run, event)
        return commands

    def _take_back_run(self, run: IssuedRun, event: StepReturned) -> list[Command]:
        planned, sequence = run.planned, run.sequence
        fault = event.faults.get(planned.sequence)
        if fault is not None:
            self._distrust(run)
        if not run.is_current:
            return []
        if fault is None and planned.draws and planned.sequence not in event.tokens:
            fault = f"step {event.step} brought no token for it"
        if fault is None and planned.scoring and planned.sequence not in event.scored:
            fault = f"step {event.step} brought no log-probabilities of its prompt"
        if fault is not None:
            return [self._end(sequence, "error", fault)]
        sequence.in_flight -= 1
        sequence.returned = planned.start + len(planned.tokens)
        commands = self._accept_scores(sequence, planned)
        if planned.draws:
            return commands + self._accept(sequence, event.tokens[planned.sequence])
        if sequence.returned == len(sequence.tokens):  # nothing is to be drawn behind the prompt
            commands.append(self._end(sequence, "length"))
        return commands

    def _accept_scores(self, sequence: Sequence, planned: PlannedRun) -> list[Command]:
        if planned.scoring is None:
            return []
        first, num_rows = planned.start + planned.scoring.first_row, planned.scoring.num_rows
        assert first == sequence.scored, (first, sequence)
        sequence.scored += num_rows
        return [Scored(planned.sequence, first + 1, num_rows)]

    def _accept(self, sequence: Sequence, token: int) -> list[Command]:
        """A drawn token: part of the text, or the end of it."""
        request = sequence.request
        if token in request.eos:
            return [self._end(sequence, "stop", eos_token=token)]
        generated = Generated(request.sequence, token, sequence.num_generated)
        sequence.tokens.append(token)
        length = len(sequence.tokens)
        if sequence.num_generated == request.max_new_tokens:
            return [generated, self._end(sequence, "length")]
        if length == self._max_context:
            detail = f"the model's context of {length} tokens is full"
            return [generated, self._end(sequence, "length", detail)]
        if length > self._roster.pool.capacity_tokens:
            return [generated, self._end(sequence, "length", self._why_kv_is_full())]
        if self._rope_switch is not None and sequence.rope_base <= self._rope_switch < length:
            # All its KV was computed with the tables of short texts; from here on the model
            # wants the other ones for every position.
            sequence.rope_base = length
            self._roster.send_back(sequence)
        return [generated]

    def _why_kv_is_full(self) -> str:
        return f"the workers' KV of {self._roster.pool.capacity_tokens} tokens is full"

    def _distrust(self, run: IssuedRun) -> None:
        """A run failed: what it wrote, and what its sequence wrote behind it, may be garbage.

        Others may share those blocks already. Their steps were issued later, so none of them has
        come back yet: they start anew and nothing of the garbage reaches a text.
        """
        pool = self._roster.pool
        suspects = list(run.published)
        for later in self._in_flight:
            for other in later.batch.runs:
                if other.sequence is run.sequence and other.life == run.life:
                    suspects += other.published
        garbage = {block for block, serial in suspects if pool.serial_of(block) == serial}
        for block in garbage:
            pool.forget(block)
        if run.is_current:
            self._roster.forget_blocks_of(run.sequence)
        # What those published themselves is found no more: it stands behind a forgotten block.
        for sequence in tuple(self._roster.running):
            if sequence is not run.sequence and not garbage.isdisjoint(sequence.blocks):
                self._roster.send_back(sequence)

    # --- topology ----------------------------------------------------------------------------

    def _lose_topology(self) -> list[Command]:
        self._epoch += 1
        self._first_step_of_epoch = self._next_step
        self._in_flight.clear()
        self._roster.replace_pool(BlockPool(0, self._block_tokens))
        self._is_whole = False
        return []

    def _restore_topology(self, num_blocks: int, num_stages: int) -> list[Command]:
        if self._is_whole:  # a change that nobody announced: the old chain is no more either
            self._lose_topology()
        self._roster.replace_pool(BlockPool(num_blocks, self._block_tokens))
        self._set_stages(num_stages)
        self._is_whole = True
        capacity = self._roster.pool.capacity_tokens
        return [
            self._end_too_large(sequence)
            for sequence in tuple(self._live.values())
            if max(len(sequence.tokens), _least_tokens(sequence.request)) > capacity
        ]

    def _end_too_large(self, sequence: Sequence) -> Command:
        """The new chain's KV is too small for one that was accepted before."""
        if sequence.num_generated:
            return self._end(sequence, "length", self._why_kv_is_full())
        self._end(sequence, "error")
        return Refused(
            sequence.request.sequence, self._why_too_large_for_kv(len(sequence.request.prompt))
        )

    def _set_stages(self, num_stages: int) -> None:
        self._max_steps = self._max_steps_wanted or num_stages + 1
        self._pacer = Pacer(num_stages, self._max_steps)
        self._batcher = Batcher(
            self._roster,
            num_stages=num_stages,
            token_budget=self._token_budget,
            min_chunk_tokens=self._min_chunk_tokens,
        )

    # --- always true -------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """What holds between any two events, whatever the events were."""
        self._roster.check_invariants()
        live = set(self._live.values())
        assert live == set(self._roster.waiting()) | set(self._roster.running)
        assert len(live) == self._roster.num_waiting + len(self._roster.running)
        # Nobody waits for ever: while anybody lives something is on its way, and what comes back
        # serves the oldest first.
        assert not (live and self._is_whole) or self._in_flight
        assert self._is_whole or not (self._in_flight or self._roster.running)
        self._check_steps()
        for sequence in live:
            self._check_sequence(sequence)

    def _check_steps(self) -> None:
        assert len(self._in_flight) <= self._max_steps
        numbers = [step.step for step in self._in_flight]
        assert numbers == list(range(self._next_step - len(numbers), self._next_step))
        for step in self._in_flight:
            assert (
                1 <= sum(len(run.planned.tokens) for run in step.batch.runs) <= self._token_budget
            )
            assert len({run.planned.sequence for run in step.batch.runs}) == len(step.batch.runs)
        current = [run for step in self._in_flight for run in step.batch.runs if run.is_current]
        assert Counter(run.sequence for run in current) == Counter(
            {s: s.in_flight for s in self._roster.running if s.in_flight}
        )
        _check_at_most_one_each(run.sequence for run in current if run.planned.draws)

    def _check_sequence(self, sequence: Sequence) -> None:
        length = len(sequence.tokens)
        most_new = sequence.request.max_new_tokens
        assert sequence.num_generated < most_new or (most_new == 0 and not sequence.num_generated)
        assert length < self._max_context or (most_new == 0 and length == self._max_context)
        assert 0 <= sequence.scored <= sequence.score_end
        assert sequence.scored == sequence.score_end or not sequence.num_generated
        assert not self._is_whole or length <= self._roster.pool.capacity_tokens
        switch = self._rope_switch
        assert switch is None or (sequence.rope_base > switch) == (length > switch)
        assert sequence.rope_base <= length


def _least_tokens(request: Request) -> int:
    """What must fit for it to run at all: the prompt, and the first token behind it."""
    return len(request.prompt) + min(1, request.max_new_tokens)


def _check_at_most_one_each(sequences: Iterable[Sequence]) -> None:
    counts = Counter(sequences)
    assert max(counts.values(), default=0) <= 1, counts
