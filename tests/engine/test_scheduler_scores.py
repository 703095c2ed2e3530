"""Prompts whose own tokens get log-probabilities: which rows, once each, shared prefixes or not."""

from __future__ import annotations

from collections import deque

import pytest

from engine.requests import (
    Command,
    Event,
    Finished,
    Generated,
    PlannedRun,
    Refused,
    Request,
    RunStep,
    Scored,
    ScoredRows,
    StepReturned,
    Submitted,
    TopologyLost,
    TopologyRestored,
)
from engine.scheduler import Scheduler


class Chain:
    """Steps in flight of one stage; all that came of them, in order."""

    def __init__(self, *, token_budget: int = 64, max_context: int = 128) -> None:
        self.scheduler = Scheduler(
            1,
            32,
            4,
            max_context=max_context,
            token_budget=token_budget,
            min_chunk_tokens=token_budget,
            max_steps_in_flight=3,
        )
        self.in_flight: deque[RunStep] = deque()
        self.heard: list[Command] = []

    def handle(self, event: Event) -> list[Command]:
        commands = self.scheduler.handle(event)
        self.scheduler.check_invariants()
        self.in_flight += [it for it in commands if isinstance(it, RunStep)]
        self.heard += [it for it in commands if not isinstance(it, RunStep)]
        return commands

    def submit(self, sequence: int, prompt: range, new_tokens: int = 1, *, scores: bool) -> None:
        request = Request(sequence, tuple(prompt), new_tokens, scores_prompt=scores)
        self.handle(Submitted(request))

    def answer(self, *, silent: bool = False) -> list[Command]:
        step = self.in_flight.popleft()
        tokens = {run.sequence: 1 for run in step.runs if run.draws}
        scored = frozenset(run.sequence for run in step.runs if run.scoring and not silent)
        return self.handle(StepReturned(step.step, tokens, {}, scored=scored))

    def answer_all(self) -> None:
        while self.in_flight:
            self.answer()

    @property
    def runs(self) -> list[PlannedRun]:
        return [run for step in self.in_flight for run in step.runs]


def test_every_token_but_the_first_is_scored_chunk_by_chunk() -> None:
    chain = Chain(token_budget=8)
    chain.submit(0, range(100, 118), scores=True)
    assert [run.scoring for run in chain.runs] == [
        ScoredRows(0, 8, next_token=108),
        ScoredRows(0, 8, next_token=116),
        ScoredRows(0, 1, next_token=None),  # nothing of the prompt stands behind the last token
    ]
    assert [run.draws for run in chain.runs] == [False, False, True]
    chain.answer_all()
    assert chain.heard == [
        Scored(0, 1, 8),
        Scored(0, 9, 8),
        Scored(0, 17, 1),
        Generated(0, 1, 0),
        Finished(0, "length"),
    ]


def test_a_chunk_of_the_last_token_alone_has_nothing_to_score() -> None:
    chain = Chain(token_budget=8)
    chain.submit(0, range(100, 109), scores=True)
    assert [run.scoring for run in chain.runs] == [ScoredRows(0, 8, next_token=108), None]


def test_a_prompt_may_be_scored_without_a_token_behind_it() -> None:
    chain = Chain(max_context=16)
    chain.submit(0, range(100, 116), 0, scores=True)  # the whole context
    chain.submit(1, range(200, 201), 0, scores=True)  # of one token: there is nothing to score
    assert not any(run.draws for run in chain.runs)
    chain.answer_all()
    assert chain.heard == [
        Scored(0, 1, 15),
        Finished(0, "length"),
        Finished(1, "length"),
    ]
    assert chain.scheduler.stats().blocks_free == 32


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "scores", "words"),
    [
        (range(5), 0, False, "max_new_tokens is 0, it must be at least 1"),
        (range(5), -1, True, "max_new_tokens is -1, it must be at least 0"),
        (range(17), 0, True, "the model's context of 16 leaves room for 16"),
        (range(16), 1, True, "the model's context of 16 leaves room for 15"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    prompt: range, new_tokens: int, scores: bool, words: str
) -> None:
    chain = Chain(max_context=16)
    chain.submit(0, prompt, new_tokens, scores=scores)
    (refused,) = chain.heard
    assert isinstance(refused, Refused) and words in refused.reason


def test_a_scored_prompt_computes_what_others_share_and_others_share_what_it_computes() -> None:
    chain = Chain()
    chain.submit(0, range(100, 112), scores=False)
    chain.answer_all()
    chain.submit(1, range(100, 112), scores=True)
    (run,) = chain.runs
    assert run.start == 0 and run.scoring == ScoredRows(0, 11, None)
    chain.answer_all()
    chain.submit(2, range(100, 112), scores=False)
    assert [run.start for run in chain.runs] == [8]


def test_a_replay_asks_for_what_has_not_come_and_for_nothing_twice() -> None:
    chain = Chain(token_budget=8)
    chain.submit(0, range(100, 126), scores=True)
    chain.answer()
    late = chain.in_flight[0]
    chain.handle(TopologyLost())
    chain.in_flight.clear()
    # What the lost chain still says counts for nothing.
    assert chain.handle(StepReturned(late.step, {}, {}, scored=frozenset({0}))) == []
    chain.handle(TopologyRestored(32, 1))
    assert [(run.start, run.scoring) for run in chain.runs] == [
        (0, None),
        (8, ScoredRows(0, 8, 116)),
        (16, ScoredRows(0, 8, 124)),
    ]
    chain.answer_all()
    scores = [it for it in chain.heard if isinstance(it, Scored)]
    assert scores == [Scored(0, 1, 8), Scored(0, 9, 8), Scored(0, 17, 8), Scored(0, 25, 1)]


def test_a_replay_shares_prefixes_as_far_as_they_are_scored() -> None:
    chain = Chain(token_budget=8)
    chain.submit(0, range(100, 126), 50, scores=False)
    chain.submit(1, range(100, 126), scores=True)
    while Scored(1, 1, 6) not in chain.heard:  # 2 of the first 8 tokens were the other's
        chain.answer()
    chain.handle(TopologyLost())
    chain.in_flight.clear()
    chain.handle(TopologyRestored(32, 1))
    while not any(run.sequence == 1 for run in chain.runs):
        chain.answer()
    run = next(run for run in chain.runs if run.sequence == 1)
    assert run.start == 4 and run.scoring is not None and run.scoring.first_row == 2
    chain.answer_all()
    scores = [it for it in chain.heard if isinstance(it, Scored)]
    assert [it.start for it in scores[1:]] == [it.start + it.num_tokens for it in scores[:-1]]
    assert scores[-1].start + scores[-1].num_tokens == 26


def test_an_answer_without_the_scores_that_were_asked_for_ends_the_sequence() -> None:
    chain = Chain()
    chain.submit(0, range(100, 110), scores=True)
    (finished,) = chain.answer(silent=True)
    assert finished == Finished(0, "error", "step 0 brought no log-probabilities of its prompt")
