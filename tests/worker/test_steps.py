"""One step on a real stage: who is computed, who is a fault, and what goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import scoring
from engine.stage import Stage
from engine.stage_loading import load_stage
from proto.codec import StepPayload, pack_step_tables, step_payload
from proto.messages import Fault, Sampling, Scoring, Step
from tests.support.wire import Part, pack
from worker.steps import FLOATS, Outcome, StepComputer

Make = Callable[..., Part]
HERE = "board:7710"


@pytest.fixture(scope="module")
def middle(checkpoint: Path) -> Stage:
    return load_stage(str(checkpoint), layers=(1, 2), device="cpu")


@pytest.fixture(scope="module")
def tail(checkpoint: Path) -> Stage:
    return load_stage(str(checkpoint), layers=(3, 4), device="cpu")


def computer_of(stage: Any, num_blocks: int = 4) -> StepComputer:
    return StepComputer(stage, stage.new_cache(num_blocks), num_blocks, HERE)


def payload_of(step: Step, tables: bytes, hidden: memoryview) -> StepPayload:
    return step_payload(step, memoryview(bytearray(tables + bytes(hidden))), 32, 4)


def run(computer: StepComputer, *parts: Part, is_last: bool = False) -> Outcome:
    step, tables, hidden = pack(bytes(16), 1, parts)
    return computer.compute(step, payload_of(step, tables, hidden), is_last=is_last)


def rows(outcome: Outcome) -> torch.Tensor:
    assert outcome.hidden is not None
    return torch.frombuffer(bytearray(outcome.hidden), dtype=torch.float32).view(-1, 32)


def test_a_faulty_run_changes_no_bit_of_the_others(middle: Stage, part: Make) -> None:
    good = [part(1, [1, 2, 3], blocks=[0]), part(3, [9], blocks=[2])]
    bad = part(2, [4, 5], blocks=[7])
    alone = rows(run(computer_of(middle), *good))
    beside = run(computer_of(middle), good[0], bad, good[1])
    assert torch.equal(rows(beside)[:3], alone[:3]) and torch.equal(rows(beside)[5:], alone[3:])
    assert [(fault.sequence, fault.worker) for fault in beside.faults] == [(2, HERE)]


def test_a_sequence_that_was_judged_before_is_not_judged_again(middle: Stage, part: Make) -> None:
    nan = part(2, [4], blocks=[1])
    nan.hidden = torch.full((1, 32), torch.nan)
    step, tables, hidden = pack(bytes(16), 1, [part(1, [1], blocks=[0]), nan])
    step = Step(
        lease=step.lease,
        step=1,
        runs=step.runs,
        faults=[Fault(sequence=2, worker="before:1", reason="NaN")],
    )
    outcome = computer_of(middle).compute(step, payload_of(step, tables, hidden), is_last=False)
    assert outcome.faults == []


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "NaN")])
def test_what_is_not_finite_after_the_layers_is_a_fault_with_their_numbers(
    middle: Stage, part: Make, value: float, word: str
) -> None:
    bad = part(2, [4, 5], blocks=[1])
    bad.hidden = bad.hidden.clone()
    bad.hidden[1, 3] = value
    outcome = run(computer_of(middle), part(1, [1], blocks=[0]), bad)
    (fault,) = outcome.faults
    assert (fault.sequence, fault.reason) == (2, f"{word} in hidden states after layers 1:2")


def test_a_step_without_a_sound_run_passes_its_bytes_on(middle: Stage, part: Make) -> None:
    bad = part(1, [1, 2], blocks=[9])
    outcome = run(computer_of(middle), bad)
    assert len(outcome.faults) == 1
    assert torch.equal(rows(outcome), bad.hidden)


def test_a_sequence_that_is_in_a_step_twice_is_a_fault(tail: Stage, part: Make) -> None:
    twice = [part(1, [1], blocks=[0]), part(2, [1], blocks=[1]), part(1, [2], 1, blocks=[0])]
    outcome = run(computer_of(tail), *twice, is_last=True)
    assert [fault.reason for fault in outcome.faults] == ["it is in the step twice"]
    assert [drawn.sequence for drawn in outcome.drawn] == [2]


@pytest.mark.parametrize(
    ("sampling", "wrong", "reason"),
    [
        (Sampling(num_offsets=1), {"offsets": [(300, 1.0)]}, "an offset has a token id outside"),
        (Sampling(num_offsets=1), {"offsets": [(1, float("nan"))]}, "an offset is no finite"),
        (Sampling(num_mask_words=1), {"mask": bytes(4)}, "its mask has 1 words, a vocabulary"),
        (Sampling(num_mask_words=4), {"mask": bytes(16)}, "the mask allows no token"),
    ],
)
def test_offsets_and_masks_that_cannot_be_are_a_fault_of_one_sequence(
    tail: Stage, part: Make, sampling: Sampling, wrong: dict[str, Any], reason: str
) -> None:
    assert tail.vocab_size == 128
    bad = part(1, [1], blocks=[0], sampling=sampling, **wrong)
    outcome = run(computer_of(tail), bad, part(2, [2], blocks=[1]), is_last=True)
    assert [(fault.sequence, reason in fault.reason) for fault in outcome.faults] == [(1, True)]
    assert [drawn.sequence for drawn in outcome.drawn] == [2]


def test_each_sequence_of_a_step_has_its_own_offsets_and_mask(tail: Stage, part: Make) -> None:
    mask = (1 << 40 | 1 << 41).to_bytes(16, "little")
    parts = [
        part(1, [1], blocks=[0], sampling=Sampling(num_offsets=1), offsets=[(7, 1e4)]),
        part(2, [1], blocks=[1]),
        part(3, [1], blocks=[2], sampling=Sampling(num_mask_words=4), mask=mask),
        part(
            4,
            [1],
            blocks=[3],
            sampling=Sampling(num_mask_words=4, num_offsets=2),
            offsets=[(7, 1e4), (41, 1e3)],
            mask=mask,
        ),
    ]
    tokens = [it.token for it in run(computer_of(tail), *parts, is_last=True).drawn]
    assert tokens[0] == 7 and tokens[1] != 7 and tokens[2] in (40, 41) and tokens[3] == 41


def test_a_history_outside_the_vocabulary_is_a_fault(tail: Stage, part: Make) -> None:
    sampling = Sampling(repetition_penalty=2.0, num_history=1)
    outcome = run(computer_of(tail), part(1, [1], sampling=sampling, history=[-1]), is_last=True)
    assert "history has a token id outside" in outcome.faults[0].reason


def test_greedy_tokens_of_a_batch_are_those_that_are_drawn_one_by_one(
    tail: Stage, part: Make
) -> None:
    plain = [part(s, [s, s + 1], blocks=[s]) for s in range(4)]
    probed = [part(s, [s, s + 1], blocks=[s], sampling=Sampling(logprobs=2)) for s in range(4)]
    together = run(computer_of(tail), *plain, is_last=True).drawn
    apart = [run(computer_of(tail), one, is_last=True).drawn[0] for one in probed]
    assert [drawn.token for drawn in together] == [drawn.token for drawn in apart]
    assert all(drawn.top[0] == (drawn.token, drawn.logprob) for drawn in apart)


def rows_of(scores: bytes, top: int) -> np.ndarray:
    kinds = [("own", "<f4"), ("tokens", "<i4", (top,)), ("values", "<f4", (top,))]
    return np.frombuffer(scores, dtype=kinds)


def expected_logprobs(stage: Stage, some: Part) -> torch.Tensor:
    """What the stage's own logits say of every row of a run that begins its sequence."""
    hidden = rows(run(computer_of(stage), some))
    return torch.log_softmax(stage.logits(hidden).double(), dim=-1)


@pytest.mark.parametrize("rows_at_once", [1, 2, 1000])
def test_rows_are_scored_in_pieces_beside_runs_that_are_not(
    tail: Stage, part: Make, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(scoring, "PIECE_VALUES", rows_at_once * tail.vocab_size)
    tokens = [1, 2, 3, 4, 5]
    parts = [
        part(1, [9, 8], blocks=[0]),
        part(2, tokens, blocks=[1], scoring=Scoring(first_row=0, num_rows=4, top=3)),
        part(
            3,
            tokens,
            blocks=[2],
            sampling=None,
            scoring=Scoring(first_row=1, num_rows=4, top=0, next_token=6),
        ),
    ]
    outcome = run(computer_of(tail), *parts, is_last=True)
    assert outcome.faults == [] and [drawn.sequence for drawn in outcome.drawn] == [1, 2]
    drawn = run(computer_of(tail), part(2, tokens, blocks=[1]), is_last=True).drawn
    assert drawn[0].token == outcome.drawn[1].token
    assert [(it.sequence, it.start, it.num_rows, it.top) for it in outcome.scored] == [
        (2, 1, 4, 3),
        (3, 2, 4, 0),
    ]
    expected = expected_logprobs(tail, part(2, tokens, blocks=[1]))
    whole, last = rows_of(outcome.scores[0], 3), rows_of(outcome.scores[1], 0)
    own = [float(expected[row, token]) for row, token in enumerate([2, 3, 4, 5, 6])]
    assert whole["own"] == pytest.approx(own[:4], abs=1e-5)
    assert last["own"] == pytest.approx(own[1:], abs=1e-5)
    best = expected[:4].topk(3)
    assert whole["tokens"].tolist() == best.indices.tolist()
    assert whole["values"] == pytest.approx(best.values.numpy(), abs=1e-5)


def test_a_token_that_is_the_likeliest_one_has_the_same_number_twice(
    tail: Stage, part: Make
) -> None:
    first = expected_logprobs(tail, part(1, [7]))[0].argmax()
    asked = Scoring(first_row=0, num_rows=1, top=1)
    outcome = run(computer_of(tail), part(1, [7, int(first)], scoring=asked), is_last=True)
    (row,) = rows_of(outcome.scores[0], 1)
    assert row["tokens"][0] == first and row["own"] == row["values"][0]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"first_row": 1, "num_rows": 2}, "row 2 of it is to be scored, it has 2"),
        ({"num_rows": 2**31 - 1, "top": 100}, "is to be scored, it has 2"),
        ({"num_rows": 2}, "no token stands behind its scored rows, which end at 2 of 2"),
        ({"next_token": 5}, "a token stands behind its scored rows, which end at 1 of 2"),
        ({"num_rows": 2, "next_token": 128}, "the token behind its scored rows is outside the"),
    ],
)
def test_rows_that_cannot_be_scored_are_a_fault_of_one_sequence(
    tail: Stage, part: Make, asked: dict[str, Any], reason: str
) -> None:
    asked = {"first_row": 0, "num_rows": 1, "top": 1, **asked}
    bad = part(1, [1, 2], blocks=[0], scoring=Scoring(**asked))
    good = part(2, [1, 2], blocks=[1], scoring=Scoring(first_row=0, num_rows=1, top=1))
    outcome = run(computer_of(tail), bad, good, is_last=True)
    assert [(fault.sequence, reason in fault.reason) for fault in outcome.faults] == [(1, True)]
    assert [it.sequence for it in outcome.scored] == [2] and len(outcome.scores) == 1
    assert [drawn.sequence for drawn in outcome.drawn] == [2]


def test_more_rows_than_an_answer_holds_are_faults_of_those_that_come_last(
    tail: Stage, part: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.steps.MAX_SCORE_BYTES", 40)
    asked = Scoring(first_row=0, num_rows=2, top=2)
    three = [part(s, [1, 2, 3], blocks=[s], scoring=asked) for s in range(3)]
    outcome = run(computer_of(tail), *three, is_last=True)
    assert [it.sequence for it in outcome.scored] == [0]
    assert all("an answer holds 40" in fault.reason for fault in outcome.faults)


class Broken:
    """A real stage whose head or layers fail."""

    def __init__(self, stage: Stage, error: Exception | None = None) -> None:
        self._stage, self._error = stage, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def forward(self, *args: Any) -> torch.Tensor:
        if self._error is not None:
            raise self._error
        return self._stage.forward(*args)

    def logits(self, hidden: torch.Tensor, adapters: Sequence[Any] = ()) -> torch.Tensor:
        logits = self._stage.logits(hidden, adapters).clone()
        logits[0, 5] = torch.nan
        return logits


def test_nan_in_the_logits_of_a_scored_row_is_a_fault_and_nothing_is_drawn(
    tail: Stage, part: Make
) -> None:
    asked = Scoring(first_row=0, num_rows=1, top=1)
    outcome = run(computer_of(Broken(tail)), part(1, [1, 2], scoring=asked), is_last=True)
    assert [fault.reason for fault in outcome.faults] == ["the logits hold NaN or infinity"]
    assert outcome.drawn == [] and outcome.scored == []


def test_nan_in_the_logits_is_a_fault_of_its_row_alone(tail: Stage, part: Make) -> None:
    two = [part(1, [1], blocks=[0]), part(2, [2], blocks=[1])]
    outcome = run(computer_of(Broken(tail)), *two, is_last=True)
    assert [(fault.sequence, fault.reason) for fault in outcome.faults] == [
        (1, "NaN in the logits")
    ]
    assert [drawn.sequence for drawn in outcome.drawn] == [2]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory in a step of 3 tokens of 2 sequences, "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB"),
            "MB are free: DefaultCPUAllocator",
        ),
        (ValueError("two\nlines"), "internal error: ValueError: two lines"),
    ],
)
def test_an_error_of_the_step_is_a_fault_of_every_sequence_and_the_next_step_runs(
    middle: Stage, part: Make, error: Exception, words: str
) -> None:
    two = [part(1, [1], blocks=[0]), part(2, [2, 3], blocks=[1])]
    broken = run(computer_of(Broken(middle, error)), *two)
    assert [fault.sequence for fault in broken.faults] == [1, 2]
    assert all(words in fault.reason for fault in broken.faults)
    assert not run(computer_of(middle), *two).faults


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_bits_tell_finite_numbers_from_infinity_and_nan(name: str) -> None:
    floats = FLOATS[name]
    largest = torch.finfo(floats.dtype).max
    for value, is_finite in (
        (largest, True),
        (-largest, True),
        (0.0, True),
        (-0.0, True),
        (torch.inf, False),
        (-torch.inf, False),
        (torch.nan, False),
    ):
        bits = floats.of(torch.tensor([[0.5, value]], dtype=floats.dtype))
        assert (floats.largest(bits) < floats.infinity) == is_finite
        assert bits.data.cast("B").nbytes == 2 * floats.dtype.itemsize


def test_a_step_that_is_not_computed_has_a_fault_for_each_sequence(
    middle: Stage, part: Make
) -> None:
    step, tables, hidden = pack(bytes(16), 1, [part(1, [1]), part(2, [2])])
    outcome = computer_of(middle).fault(step, payload_of(step, tables, hidden), "too busy")
    assert [(fault.sequence, fault.reason) for fault in outcome.faults] == [
        (1, "too busy"),
        (2, "too busy"),
    ]
    assert outcome.hidden is not None and np.array_equal(outcome.hidden, hidden)
    assert pack_step_tables([1, 2], [0, 0], []) == tables
