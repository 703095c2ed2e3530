"""What each event means for a sequence: joining, leaving, sharing, losing one's place."""

from __future__ import annotations

from typing import TypeVar

import pytest

from engine.requests import (
    Cancelled,
    Command,
    Finished,
    Generated,
    PlannedRun,
    Refused,
    Request,
    RunStep,
    StepReturned,
    Stopped,
    Submitted,
    TopologyLost,
    TopologyRestored,
)
from engine.scheduler import Scheduler
from proto.errors import RemoteProtocolError

SomeCommand = TypeVar("SomeCommand")
EOS = 99


def scheduler_for(
    num_stages: int = 1,
    num_blocks: int = 64,
    block_tokens: int = 4,
    *,
    token_budget: int = 64,
    max_context: int = 128,
    rope_switch: int | None = None,
    max_running: int = 16,
    num_state_slots: int = 0,
    share_prefixes: bool = True,
    max_steps_in_flight: int | None = None,
) -> Scheduler:
    return Scheduler(
        num_stages,
        num_blocks,
        block_tokens,
        max_context=max_context,
        token_budget=token_budget,
        rope_switch=rope_switch,
        max_running=max_running,
        num_state_slots=num_state_slots,
        share_prefixes=share_prefixes,
        max_steps_in_flight=max_steps_in_flight,
        min_chunk_tokens=token_budget,
    )


def submitted(
    sequence: int,
    prompt_tokens: int = 6,
    new_tokens: int = 8,
    *,
    first_token: int | None = None,
    salt: int | str = 0,
) -> Submitted:
    """A prompt that shares nothing with others, unless `first_token` says where it begins."""
    start = 1000 * (sequence + 1) if first_token is None else first_token
    prompt = tuple(range(start, start + prompt_tokens))
    return Submitted(Request(sequence, prompt, new_tokens, frozenset({EOS}), salt))


def of_kind(kind: type[SomeCommand], commands: list[Command]) -> list[SomeCommand]:
    return [command for command in commands if isinstance(command, kind)]


class Workers:
    """Steps in flight; every draw gives the same token until told otherwise."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.in_flight: list[RunStep] = []
        self.commands: list[Command] = []  # all that came, but steps

    def handle(self, *events: object) -> list[Command]:
        commands: list[Command] = []
        for event in events:
            commands += self.scheduler.handle(event)  # type: ignore[arg-type]
            self.scheduler.check_invariants()
        self.in_flight += of_kind(RunStep, commands)
        self.commands += [it for it in commands if not isinstance(it, RunStep)]
        return commands

    def answer(
        self, token: int = 1, *, faults: dict[int, str] | None = None, **tokens: int
    ) -> list[Command]:
        """The oldest step comes back; `s3=7` says what sequence 3 drew."""
        step = self.in_flight.pop(0)
        drawn = {
            run.sequence: tokens.get(f"s{run.sequence}", token)
            for run in step.runs
            if run.draws and run.sequence not in (faults or {})
        }
        return self.handle(StepReturned(step.step, drawn, faults or {}))

    def answer_all(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.in_flight:
                return
            self.answer()
        raise AssertionError("steps never end")

    def generated(self, sequence: int) -> list[int]:
        return [it.token for it in of_kind(Generated, self.commands) if it.sequence == sequence]

    def finished(self, sequence: int) -> Finished:
        (finished,) = (it for it in of_kind(Finished, self.commands) if it.sequence == sequence)
        return finished

    def run_of(self, sequence: int, step: int = -1) -> PlannedRun:
        (run,) = (run for run in self.in_flight[step].runs if run.sequence == sequence)
        return run


# --- one sequence ----------------------------------------------------------------------------


def test_a_prompt_goes_out_at_once_and_its_last_token_draws() -> None:
    workers = Workers(scheduler_for())
    commands = workers.handle(submitted(0, prompt_tokens=6))
    assert commands == [
        RunStep(
            step=0,
            epoch=0,
            runs=(
                PlannedRun(
                    sequence=0,
                    start=0,
                    tokens=(1000, 1001, 1002, 1003, 1004, 1005),
                    blocks=(0, 1),
                    rope_length=6,
                    draws=True,
                    draw=0,
                ),
            ),
        )
    ]


def test_a_drawn_token_is_fed_next_at_its_position() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, prompt_tokens=6))
    assert workers.answer(7)[0] == Generated(0, token=7, draw=0)
    run = workers.run_of(0)
    assert (run.start, run.tokens, run.draws, run.draw) == (6, (7,), True, 1)
    assert run.rope_length == 6


def test_one_sequence_is_one_step_at_a_time_however_many_stages() -> None:
    workers = Workers(scheduler_for(num_stages=4))
    workers.handle(submitted(0, prompt_tokens=1))
    for _ in range(5):
        assert len(workers.in_flight) == 1
        workers.answer()


def test_the_end_token_ends_the_text_without_being_part_of_it() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0))
    workers.answer(7)
    assert workers.answer(EOS) == [Finished(0, "stop", eos_token=EOS)]
    assert workers.generated(0) == [7]


def test_the_last_wanted_token_ends_the_text() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, new_tokens=3))
    workers.answer_all()
    assert workers.generated(0) == [1, 1, 1]
    assert workers.finished(0) == Finished(0, "length")


def test_a_full_context_ends_the_text_and_says_so() -> None:
    workers = Workers(scheduler_for(max_context=10))
    workers.handle(submitted(0, prompt_tokens=6, new_tokens=50))
    workers.answer_all()
    assert len(workers.generated(0)) == 4
    assert workers.finished(0) == Finished(0, "length", "the model's context of 10 tokens is full")


def test_a_lone_sequence_that_fills_all_blocks_ends_there_and_says_so() -> None:
    workers = Workers(scheduler_for(num_blocks=3, block_tokens=4))
    workers.handle(submitted(0, prompt_tokens=6, new_tokens=50))
    workers.answer_all()
    assert len(workers.generated(0)) == 7  # 12 tokens have KV, the 13th was drawn from them
    assert workers.finished(0).detail == "the workers' KV of 12 tokens is full"


def test_a_stop_text_ends_a_sequence_and_its_late_token_is_ignored() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0))
    workers.answer()
    assert workers.handle(Stopped(0)) == [Finished(0, "stop")]
    assert workers.answer() == []
    assert workers.scheduler.stats().blocks_free == 64


def test_a_cancelled_sequence_holds_nothing_even_with_steps_in_flight() -> None:
    workers = Workers(scheduler_for(num_stages=3, token_budget=8))
    workers.handle(submitted(0, prompt_tokens=30))
    assert len(workers.in_flight) == 4
    assert workers.handle(Cancelled(0)) == [Finished(0, "cancelled")]
    assert workers.scheduler.stats().blocks_free == 64
    workers.answer_all()
    assert workers.commands == [Finished(0, "cancelled")]


def test_a_waiting_sequence_can_be_cancelled() -> None:
    workers = Workers(scheduler_for(max_running=1))
    workers.handle(submitted(0), submitted(1), submitted(2))
    assert workers.handle(Cancelled(1)) == [Finished(1, "cancelled")]
    workers.answer_all()
    assert workers.finished(2).reason == "length"


@pytest.mark.parametrize("event", [Cancelled(5), Stopped(5)])
def test_nothing_is_said_of_a_sequence_that_is_not_live(event: Cancelled | Stopped) -> None:
    assert Workers(scheduler_for()).handle(event) == []


def test_the_number_of_a_finished_sequence_can_be_used_again() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0), Cancelled(0), submitted(0, new_tokens=2))
    workers.answer(7)  # the cancelled one's
    assert workers.generated(0) == []
    workers.answer_all()
    assert workers.generated(0) == [1, 1]


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (submitted(0, 0), "the prompt has 0 tokens, a model needs at least 1: write something"),
        (submitted(0, 6, 0), "max_new_tokens is 0, it must be at least 1"),
        (
            submitted(0, 128),
            "the prompt has 128 tokens, the model's context of 128 leaves room for 127",
        ),
        (
            submitted(0, 64),
            "the prompt has 64 tokens, the workers' KV can hold 64: "
            "start them with a larger --kv-memory or shorten the prompt",
        ),
    ],
    ids=["empty", "nothing-wanted", "context", "kv"],
)
def test_a_request_that_can_never_run_is_refused_at_once_with_the_numbers(
    event: Submitted, reason: str
) -> None:
    (refused,) = Workers(scheduler_for(num_blocks=16)).handle(event)
    assert isinstance(refused, Refused) and refused.reason.startswith(reason)


def test_the_longest_possible_prompt_runs() -> None:
    workers = Workers(scheduler_for(num_blocks=16))
    workers.handle(submitted(0, 63))
    workers.answer_all()
    assert workers.finished(0).detail == "the workers' KV of 64 tokens is full"
    assert len(workers.generated(0)) == 2


# --- batching --------------------------------------------------------------------------------


def test_sequences_join_and_leave_between_steps() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, new_tokens=4))
    workers.answer()
    workers.handle(submitted(1, new_tokens=4))
    sizes = []
    while workers.in_flight:
        sizes.append({run.sequence for run in workers.in_flight[0].runs})
        workers.answer()
    assert {0} in sizes and {0, 1} in sizes and {1} in sizes


def test_decode_goes_first_and_prefill_gets_the_rest_of_the_budget() -> None:
    workers = Workers(scheduler_for(token_budget=8, max_steps_in_flight=1))
    workers.handle(submitted(0), submitted(1, prompt_tokens=20))
    workers.answer()
    (step,) = workers.in_flight
    assert [(run.sequence, len(run.tokens), run.draws) for run in step.runs] == [
        (0, 1, True),
        (1, 7, False),
    ]


def test_prompts_are_served_in_the_order_in_which_they_came() -> None:
    workers = Workers(scheduler_for(token_budget=8, max_steps_in_flight=1))
    workers.handle(submitted(9, 4, 1), submitted(3, 12, 1), submitted(5, 4, 1))
    order = []
    while workers.in_flight:
        order += [run.sequence for run in workers.in_flight[0].runs]
        workers.answer()
    assert order == [9, 3, 3, 5]


def test_chunks_of_a_long_prompt_follow_each_other_without_waiting() -> None:
    workers = Workers(scheduler_for(num_stages=3, token_budget=8))
    workers.handle(submitted(0, prompt_tokens=30))
    assert [workers.run_of(0, step).start for step in range(4)] == [0, 8, 16, 24]
    assert [workers.run_of(0, step).draws for step in range(4)] == [False] * 3 + [True]
    assert workers.run_of(0, 3).blocks[:6] == workers.run_of(0, 2).blocks


def test_prompts_that_were_read_together_decode_in_one_group_a_stage() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(*(submitted(number, 4) for number in range(8)))
    while any(run.draw == 0 for step in workers.in_flight for run in step.runs):
        workers.answer()
    workers.answer()
    assert [len(step.runs) for step in workers.in_flight] == [4, 4]


def test_no_step_is_issued_beyond_the_limit_given() -> None:
    workers = Workers(scheduler_for(num_stages=4, token_budget=4, max_steps_in_flight=2))
    workers.handle(submitted(0, prompt_tokens=40))
    assert len(workers.in_flight) == 2


def test_no_more_sequences_run_than_allowed() -> None:
    workers = Workers(scheduler_for(max_running=2))
    workers.handle(*(submitted(number) for number in range(5)))
    stats = workers.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    workers.answer_all()
    assert {it.sequence for it in of_kind(Finished, workers.commands)} == set(range(5))


def test_every_running_sequence_owns_a_state_slot_of_its_own() -> None:
    workers = Workers(scheduler_for(num_state_slots=2))
    workers.handle(submitted(0, first_token=5), submitted(1, first_token=5), submitted(2))
    slots = {run.state_slot for step in workers.in_flight for run in step.runs}
    assert slots == {0, 1}
    assert workers.scheduler.stats().shared_tokens == 0  # the state of a prefix is in no block
    workers.answer_all()
    assert len(of_kind(Finished, workers.commands)) == 3


# --- sharing ---------------------------------------------------------------------------------


def test_a_second_prompt_reuses_the_full_blocks_of_the_first() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(submitted(0, 10, first_token=5))
    workers.answer()
    workers.handle(submitted(1, 14, first_token=5))
    run = workers.run_of(1)
    assert run.start == 8 and run.tokens == tuple(range(13, 19))
    assert run.blocks[:2] == (0, 1)
    assert workers.scheduler.stats().shared_tokens == 8


def test_a_prefix_is_shared_as_soon_as_the_step_that_computes_it_is_issued() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(submitted(0, 10, first_token=5), submitted(1, 10, first_token=5))
    assert [len(step.runs) for step in workers.in_flight] == [1, 1]
    assert workers.run_of(1).start == 8


def test_a_prefix_is_not_shared_within_the_step_that_computes_it() -> None:
    workers = Workers(scheduler_for(max_steps_in_flight=1))
    workers.handle(
        submitted(0, 3), submitted(1, 10, first_token=5), submitted(2, 10, first_token=5)
    )
    workers.answer()
    assert {run.sequence for run in workers.in_flight[0].runs} == {0, 1}
    workers.answer()
    assert workers.run_of(2).start == 8


def test_at_least_the_last_prompt_token_is_computed() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(submitted(0, 8, first_token=5))
    workers.answer()
    workers.handle(submitted(1, 8, first_token=5))
    assert workers.run_of(1).start == 4


def test_what_was_generated_is_shared_with_a_prompt_that_goes_on_from_it() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, 6, 7, first_token=5))
    workers.answer_all()
    prompt = (*range(5, 11), *[1] * 7, 50, 51)
    workers.handle(Submitted(Request(1, prompt, 1)))
    assert workers.run_of(1).start == 12


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_another_salt_or_no_sharing_wanted_computes_everything(share_prefixes: bool) -> None:
    workers = Workers(scheduler_for(share_prefixes=share_prefixes))
    workers.handle(submitted(0, 10, first_token=5))
    workers.handle(submitted(1, 10, first_token=5, salt="other" if share_prefixes else 0))
    assert workers.run_of(1).start == 0


# --- short KV --------------------------------------------------------------------------------


def test_one_that_does_not_fit_now_waits() -> None:
    workers = Workers(scheduler_for(num_blocks=4))
    workers.handle(submitted(0, 10, 2), submitted(1, 10, 2))
    assert workers.scheduler.stats().waiting == 1
    workers.answer_all()
    assert len(workers.generated(1)) == 2


def test_a_newcomer_leaves_the_older_ones_a_block_to_grow_into() -> None:
    workers = Workers(scheduler_for(num_blocks=4))
    workers.handle(submitted(0, 4, 8), submitted(1, 11, 2))
    assert workers.scheduler.stats().running == 1


def test_the_youngest_gives_way_and_generates_the_same_later() -> None:
    workers = Workers(scheduler_for(num_blocks=5))
    workers.handle(submitted(0, 7, 12), submitted(1, 7, 12))
    while workers.scheduler.stats().preemptions == 0:
        workers.answer()
    before = len(workers.generated(1))
    assert workers.scheduler.stats().waiting == 1 and before > 0
    again = None
    while again is None:
        workers.answer()
        runs = (run for step in workers.in_flight for run in step.runs)
        again = next((run for run in runs if run.sequence == 1), None)
    assert len(workers.generated(0)) == 12
    # From the first block on that did not stay in the cache, with the tables of its first life.
    assert again.start + len(again.tokens) == 7 + before
    assert (again.rope_length, again.draws, again.draw) == (7, True, before)
    workers.answer_all()
    assert len(workers.generated(1)) == 12


def test_the_oldest_waits_for_the_youngest_to_come_home_and_then_takes_its_blocks() -> None:
    workers = Workers(scheduler_for(num_stages=2, num_blocks=5))
    workers.handle(submitted(0, 8, 12), submitted(1, 8, 12))
    while workers.scheduler.stats().preemptions == 0:
        # The youngest is in flight when the oldest needs a block: it is left alone till then.
        workers.answer()
    workers.answer_all()
    assert len(workers.generated(0)) == len(workers.generated(1)) == 12
    order = [it.sequence for it in of_kind(Finished, workers.commands)]
    assert order == [0, 1]


@pytest.mark.parametrize("rope_switch", [None, *range(5, 12)])
def test_a_prompt_being_read_is_held_back_when_an_older_one_needs_its_blocks(
    rope_switch: int | None,
) -> None:
    scheduler = scheduler_for(2, 36, 1, token_budget=2, rope_switch=rope_switch)
    workers = Workers(scheduler)
    workers.handle(submitted(0, 4, 12))
    workers.answer()
    workers.answer()
    workers.handle(submitted(1, 30, 2))
    assert scheduler.stats().running == 2
    read = 0
    while scheduler.stats().preemptions == 0:
        read = max(read, (scheduler.progress(1) or (0, 0))[0])
        workers.answer()
    # It gives way in the middle of its prompt: no further chunk goes out before.
    assert 0 < read < 26 and len(workers.generated(0)) < 10
    workers.answer_all()
    assert len(workers.generated(0)) == 12 and len(workers.generated(1)) == 2


def test_the_youngest_keeps_its_blocks_while_it_waits_for_one_more() -> None:
    workers = Workers(scheduler_for(num_blocks=5))
    workers.handle(submitted(0, 9, 4), submitted(1, 7, 12))
    workers.answer_all()
    assert workers.scheduler.stats().preemptions == 0
    assert len(workers.generated(1)) == 12


# --- rotary tables ---------------------------------------------------------------------------


def test_past_the_rope_switch_everything_is_computed_anew_with_the_other_tables() -> None:
    workers = Workers(scheduler_for(rope_switch=8))
    workers.handle(submitted(0, 6, 10))
    for _ in range(3):
        assert workers.run_of(0).rope_length == 6
        workers.answer()
    run = workers.run_of(0)  # 9 tokens now
    assert (run.start, len(run.tokens), run.rope_length, run.draw) == (0, 9, 9, 3)
    workers.answer()
    run = workers.run_of(0)
    assert (run.start, run.rope_length, run.draw) == (9, 9, 4)


def test_a_prompt_past_the_rope_switch_never_restarts() -> None:
    workers = Workers(scheduler_for(rope_switch=8))
    workers.handle(submitted(0, 9, 10))
    workers.answer()
    assert (workers.run_of(0).start, workers.run_of(0).rope_length) == (9, 9)


def test_long_and_short_texts_share_no_blocks() -> None:
    workers = Workers(scheduler_for(num_stages=2, rope_switch=12))
    workers.handle(submitted(0, 10, 1, first_token=5), submitted(1, 16, 1, first_token=5))
    assert workers.run_of(1).start == 0


def test_a_restarted_sequence_comes_before_younger_ones_that_run() -> None:
    workers = Workers(scheduler_for(rope_switch=8, num_blocks=6))
    workers.handle(submitted(0, 7, 14), submitted(1, 3, 10))
    workers.answer_all()
    assert [it.sequence for it in of_kind(Finished, workers.commands)] == [0, 1]
    assert len(workers.generated(0)) == 14 and len(workers.generated(1)) == 10


# --- faults ----------------------------------------------------------------------------------


def test_a_fault_ends_its_sequence_and_the_others_go_on() -> None:
    workers = Workers(scheduler_for(max_steps_in_flight=1))
    workers.handle(submitted(0), submitted(1), submitted(2))
    workers.answer()
    commands = workers.answer(faults={1: "NaN at worker a:1"})
    assert Finished(1, "error", "NaN at worker a:1") in commands
    workers.answer_all()
    assert workers.finished(0).reason == workers.finished(2).reason == "length"


def test_a_token_that_is_missing_is_a_fault() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0))
    commands = workers.handle(StepReturned(0, {}, {}))
    assert commands == [Finished(0, "error", "step 0 brought no token for it")]


def test_blocks_of_a_faulty_sequence_are_shared_no_more() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, 10, first_token=5))
    workers.answer()
    workers.answer(faults={0: "NaN"})
    workers.handle(submitted(1, 10, first_token=5))
    assert workers.run_of(1).start == 0


def test_who_shares_blocks_of_a_step_that_failed_starts_anew() -> None:
    workers = Workers(scheduler_for(num_stages=3))
    workers.handle(
        submitted(0, 10, first_token=5), submitted(1, 10, 3, first_token=5), submitted(2)
    )
    assert workers.run_of(1, 1).start == 8
    workers.answer(faults={0: "NaN"})
    anew = workers.in_flight[-1].runs[0]
    assert (anew.sequence, anew.start, len(anew.tokens)) == (1, 0, 10)
    workers.answer(s1=66)  # computed from garbage
    assert workers.generated(1) == []
    workers.answer_all()
    assert workers.generated(1) == [1, 1, 1]


def test_a_cancelled_sequence_that_fails_late_takes_its_sharers_back_too() -> None:
    workers = Workers(scheduler_for(num_stages=3))
    workers.handle(submitted(0, 10, first_token=5), submitted(1, 10, 3, first_token=5))
    workers.handle(Cancelled(0))
    workers.answer(faults={0: "NaN"})
    assert workers.in_flight[-1].runs[0].start == 0
    workers.answer_all()
    assert workers.generated(1) == [1, 1, 1]


def test_chunks_behind_a_failed_one_are_distrusted_as_well() -> None:
    workers = Workers(scheduler_for(num_stages=4, token_budget=8))
    workers.handle(submitted(0, 18, first_token=5), submitted(1, 18, 2, first_token=5))
    assert workers.run_of(1).start == 16
    anew = of_kind(RunStep, workers.answer(faults={0: "NaN"}))
    assert anew[0].runs[0].start == 0
    workers.answer_all()
    assert workers.generated(1) == [1, 1]


# --- topology --------------------------------------------------------------------------------


def test_a_lost_chain_sends_everybody_back_and_issues_nothing() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(submitted(0), submitted(1))
    assert workers.handle(TopologyLost()) == []
    assert workers.handle(submitted(2)) == []
    stats = workers.scheduler.stats()
    assert (stats.epoch, stats.waiting, stats.running, stats.steps_in_flight) == (1, 3, 0, 0)
    assert stats.blocks_total == 0


def test_a_restored_chain_goes_on_with_prompt_and_generated() -> None:
    workers = Workers(scheduler_for(num_stages=2))
    workers.handle(submitted(0, 6, 5))
    workers.answer(7)
    workers.answer(8)
    workers.handle(TopologyLost())
    workers.in_flight.clear()
    (step,) = workers.handle(TopologyRestored(num_blocks=32, num_stages=1))
    assert isinstance(step, RunStep) and step.epoch == 1
    (run,) = step.runs
    assert (run.start, len(run.tokens), run.draw, run.rope_length) == (0, 8, 2, 6)
    workers.answer_all()
    assert len(workers.generated(0)) == 5
    assert workers.scheduler.stats().blocks_total == 32


def test_late_steps_of_a_lost_chain_are_ignored() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0))
    workers.handle(TopologyLost(), TopologyRestored(64, 1))
    assert workers.handle(StepReturned(0, {0: 55}, {})) == []
    assert workers.generated(0) == []


def test_a_chain_that_changes_unannounced_is_a_new_epoch_too() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0))
    workers.handle(TopologyRestored(64, 3))
    assert workers.scheduler.epoch == 1
    assert workers.in_flight[-1].epoch == 1


def test_a_chain_with_less_kv_ends_those_that_cannot_fit_any_more() -> None:
    workers = Workers(scheduler_for())
    workers.handle(submitted(0, 20), submitted(1, 4))
    workers.answer()
    workers.handle(TopologyLost(), submitted(2, 16), submitted(3, 15, 1))
    commands = workers.handle(TopologyRestored(num_blocks=4, num_stages=1))
    assert commands[:2] == [
        Finished(0, "length", "the workers' KV of 16 tokens is full"),
        Refused(
            2,
            "the prompt has 16 tokens, the workers' KV can hold 16: start them with a larger "
            "--kv-memory or shorten the prompt",
        ),
    ]
    assert workers.scheduler.stats().running + workers.scheduler.stats().waiting == 2


# --- the shell's mistakes, and things to look at ---------------------------------------------


def test_a_step_out_of_order_is_an_error_that_names_both() -> None:
    workers = Workers(scheduler_for(num_stages=3, token_budget=4))
    workers.handle(submitted(0, 12))
    with pytest.raises(RemoteProtocolError, match="step 1 came back where step 0 was due"):
        workers.scheduler.handle(StepReturned(1, {}, {}))


def test_a_step_that_was_never_issued_is_an_error() -> None:
    with pytest.raises(RemoteProtocolError, match="step 7 came back where none was due"):
        scheduler_for().handle(StepReturned(7, {}, {}))


def test_progress_counts_prompt_tokens_that_came_back() -> None:
    workers = Workers(scheduler_for(token_budget=8, max_running=1))
    workers.handle(submitted(0, 20), submitted(1, 5))
    assert workers.scheduler.progress(0) == (0, 20)
    workers.answer()
    assert workers.scheduler.progress(0) == (8, 20)
    assert workers.scheduler.progress(1) == (0, 5)
    workers.answer()
    workers.answer()
    workers.answer()
    assert workers.scheduler.progress(0) == (20, 20)
    assert workers.scheduler.progress(77) is None


def test_stats_tell_what_is_held() -> None:
    workers = Workers(scheduler_for(num_stages=2, num_blocks=10))
    workers.handle(submitted(0, 10))
    stats = workers.scheduler.stats()
    assert (stats.blocks_total, stats.blocks_free) == (10, 7)
    assert (stats.steps_in_flight, stats.running, stats.decode_groups) == (1, 1, 2)
