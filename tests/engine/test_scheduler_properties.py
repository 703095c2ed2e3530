"""Any order of events: nobody lost or starved, limits kept, every text the right one."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from engine.requests import Request
from tests.support.toy_chain import ToyModel
from tests.support.toy_shell import Limits, ToyShell

MODELS = [ToyModel(), ToyModel(rope_switch=13), ToyModel(rope_by_length=True)]
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


class SchedulerMachine(RuleBasedStateMachine):
    """A user, workers and failures, in any order; `ToyShell` checks every command."""

    shell: ToyShell

    @initialize(
        model=st.sampled_from(MODELS),
        limits=st.builds(
            Limits,
            num_stages=st.integers(1, 4),
            num_blocks=st.integers(9, 30),
            block_tokens=st.integers(1, 4),
            token_budget=st.sampled_from([1, 4, 32]),
            max_running=st.integers(1, 6),
            num_state_slots=st.sampled_from([0, 0, 2]),
            min_chunk_tokens=st.sampled_from([1, 8]),
        ),
        seed=st.integers(0, 2**32),
    )
    def start(self, model: ToyModel, limits: Limits, seed: int) -> None:
        self.shell = ToyShell(model, limits, random.Random(seed))

    @rule(
        prompt=PROMPTS,
        new_tokens=st.integers(0, 24),
        scores=st.booleans(),
        eos=st.frozensets(st.integers(0, 39), max_size=3),
    )
    def submit(self, prompt: list[int], new_tokens: int, scores: bool, eos: frozenset[int]) -> None:
        salt = self.shell.model.salt(prompt)
        number = len(self.shell.stories)
        self.shell.submit(Request(number, tuple(prompt), new_tokens, eos, salt, scores))

    @precondition(lambda self: self.shell.busy_stages)
    @rule(steps=st.lists(st.integers(0, 3), min_size=1, max_size=12))
    def work(self, steps: list[int]) -> None:
        for choice in steps:
            busy = self.shell.busy_stages
            if busy:
                self.shell.advance(busy[choice % len(busy)])

    @precondition(lambda self: self.shell.busy_stages)
    @rule(choice=st.integers(0, 3), run=st.integers(0, 5))
    def fail(self, choice: int, run: int) -> None:
        busy = self.shell.busy_stages
        self.shell.advance(busy[choice % len(busy)], fault_in=run)

    @precondition(lambda self: self.shell.live)
    @rule(choice=st.integers(0, 20), cancelled=st.booleans())
    def end(self, choice: int, cancelled: bool) -> None:
        live = self.shell.live
        (self.shell.cancel if cancelled else self.shell.stop)(live[choice % len(live)])

    @rule()
    def lose_chain(self) -> None:
        self.shell.lose_chain()

    @rule(num_stages=st.integers(1, 3), num_blocks=st.integers(3, 30))
    def restore_chain(self, num_stages: int, num_blocks: int) -> None:
        self.shell.restore_chain(num_stages, num_blocks)

    @rule()
    def deliver_late(self) -> None:
        self.shell.deliver_late()

    def teardown(self) -> None:
        if hasattr(self, "shell"):
            self.shell.run_dry()  # nobody is lost or starved
            self.shell.check_stories()
            stats = self.shell.scheduler.stats()
            assert (stats.waiting, stats.running) == (0, 0)
            assert stats.blocks_free == stats.blocks_total


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
