"""Drawing a token: transformers' filters, exact distributions, and replays that draw the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from engine.sampling import draw, uniform
from proto.errors import StepFailed
from proto.messages import Sampling

SIZE = 24
DRAWS = 4000


def logits_of(seed: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def counts(logits: Tensor, draws: int = DRAWS, **parameters: Any) -> Tensor:
    """How often each token is drawn by the counters 0, 1, ..."""
    tensors = [parameters.pop(name, None) for name in ("history", "offsets", "allowed")]
    drawn = [
        draw(logits, Sampling(temperature=temperature, draw=at, **rest), *tensors)[0]
        for temperature, rest in [(parameters.pop("temperature", 1.0), parameters)]
        for at in range(draws)
    ]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits))


def theirs(logits: Tensor, history: list[int] | None = None, **parameters: Any) -> Tensor:
    """Probabilities behind transformers' own processors, in the order of its `generate`."""
    seen = torch.tensor([history or [0]])
    scores = logits[None].double()
    if parameters.get("repetition_penalty", 1.0) != 1.0 and history:
        penalty = parameters["repetition_penalty"]
        scores = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(seen, scores)
    warpers = {
        "temperature": logits_process.TemperatureLogitsWarper,
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in parameters:
            scores = warper(parameters[name])(seen, scores)
    return torch.softmax(scores[0], dim=-1)


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": SIZE + 10},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 3, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.7, "min_p": 0.2},
    {"repetition_penalty": 1.8, "history": [0, 3, 5, 9, 11]},
    {"repetition_penalty": 0.6, "history": [1, 2, 20], "top_k": 6},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_drawn_as_often_as_transformers_would(case: dict[str, Any]) -> None:
    logits = logits_of(7)
    history = case.get("history")
    parameters = {name: value for name, value in case.items() if name != "history"}
    expected = theirs(logits, history, **parameters)
    seen = torch.tensor(history) if history else None
    drawn = counts(logits, history=seen, **parameters)
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    # Five standard deviations of a binomial count; the draws are the same on every machine.
    bound = 5 * (DRAWS * expected * (1 - expected)).sqrt() + 1e-6
    assert ((drawn - DRAWS * expected).abs() <= bound).all()


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, SIZE + 1),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.5, 3),
    history=st.lists(st.integers(0, SIZE - 1), unique=True, max_size=8),
)
def test_only_tokens_that_transformers_keeps_are_drawn(
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    history: list[int],
) -> None:
    logits = logits_of(seed)
    parameters: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": penalty,
    } | ({"top_k": top_k} if top_k else {})
    kept = theirs(logits, history, **parameters) > 0
    sampling = Sampling(seed=seed, **parameters)
    for at in range(10):
        token, _, _ = draw(
            logits, at_counter(sampling, at), torch.tensor(history, dtype=torch.int64)
        )
        assert kept[token]


def at_counter(sampling: Sampling, at: int) -> Sampling:
    return msgspec.structs.replace(sampling, draw=at)


def test_counters_spread_evenly_over_the_unit_interval() -> None:
    """Nearly equal counters do not mean nearly equal numbers."""
    numbers = sorted(uniform(3, at) for at in range(2000))
    assert 0 <= numbers[0] < 0.01 and 0.99 < numbers[-1] < 1
    assert len(set(numbers)) == 2000
    largest_gap = max(b - a for a, b in pairwise(numbers))
    assert largest_gap < 0.01


@given(seed=st.integers(0, 2**63 - 1), at=st.integers(0, 2**31 - 1))
def test_a_replay_draws_the_same(seed: int, at: int) -> None:
    logits = logits_of(1)
    sampling = Sampling(seed=seed, draw=at, temperature=1.3, top_p=0.9)
    torch.manual_seed(at % 1000)  # the library's generator has no say
    first = draw(logits, sampling)
    torch.manual_seed(at % 1000 + 1)
    assert draw(logits, sampling) == first


def test_seed_and_counter_both_matter() -> None:
    logits = torch.zeros(1000)
    by_counter = {draw(logits, Sampling(temperature=1.0, draw=at))[0] for at in range(50)}
    by_seed = {draw(logits, Sampling(temperature=1.0, seed=seed))[0] for seed in range(50)}
    assert len(by_counter) > 40
    assert len(by_seed) > 40


def test_pinned_draws_stay_what_they_are() -> None:
    """A saved seed gives the same text in every release, on every machine."""
    numbers = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(2**63 - 1, 2**31 - 1)]
    assert numbers == [
        0.8336885269740499,
        0.9459165357046844,
        0.3214364412611488,
        0.05228336856930549,
    ]


def test_greedy_takes_the_most_likely_and_the_first_of_equals() -> None:
    logits = logits_of(3)
    assert draw(logits, Sampling())[0] == int(logits.argmax())
    assert draw(torch.tensor([1.0, 5.0, 5.0, 2.0]), Sampling())[0] == 1


def test_greedy_heeds_the_penalty_and_no_filter() -> None:
    logits = torch.tensor([4.0, 3.9, -1.0])
    seen = torch.tensor([0])
    assert draw(logits, Sampling(repetition_penalty=1.2), seen)[0] == 1
    assert draw(logits, Sampling(repetition_penalty=1.2), None)[0] == 0
    assert draw(logits, Sampling(top_k=1, top_p=0.1, min_p=1.0))[0] == 0


def test_logits_are_left_as_they_are() -> None:
    logits = logits_of(5)
    before = logits.clone()
    draw(logits, Sampling(temperature=0.5, repetition_penalty=2.0, logprobs=3), torch.tensor([1]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_of_the_models_own_distribution(temperature: float) -> None:
    logits = logits_of(9)
    sampling = Sampling(
        temperature=temperature, logprobs=4, top_k=3, repetition_penalty=1.5, min_p=0.1
    )
    token, logprob, top = draw(logits, sampling, torch.tensor([2, 3]))
    expected = torch.log_softmax(logits.double(), dim=-1)
    assert logprob == pytest.approx(float(expected[token]), abs=1e-12)
    assert [at for at, _ in top] == expected.argsort(descending=True)[:4].tolist()
    assert [value for _, value in top] == pytest.approx(
        expected.sort(descending=True)[0][:4].tolist()
    )


def test_no_logprobs_unless_asked_and_no_more_than_there_are() -> None:
    assert draw(logits_of(1), Sampling())[1:] == (None, [])
    assert len(draw(torch.zeros(3), Sampling(logprobs=100))[2]) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, SIZE - 1])
def test_logits_that_are_no_numbers_fail_the_step(
    bad: float, place: int, temperature: float
) -> None:
    logits = logits_of(2)
    logits[place] = bad
    with pytest.raises(StepFailed, match="the logits hold NaN or infinity"):
        draw(logits, Sampling(temperature=temperature))


def test_logits_of_nothing_but_minus_infinity_fail_the_step() -> None:
    with pytest.raises(StepFailed):
        draw(torch.full((5,), float("-inf")), Sampling(temperature=1.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1000.0])
def test_tokens_that_the_model_rules_out_are_never_drawn(temperature: float) -> None:
    logits = torch.full((50,), float("-inf"))
    logits[[7, 11]] = torch.tensor([1.0, 0.5])
    sampling = Sampling(temperature=temperature, top_p=0.999999)
    assert {draw(logits, at_counter(sampling, at))[0] for at in range(100)} <= {7, 11}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6, 1000.0])
def test_extreme_temperatures_draw_a_token(temperature: float) -> None:
    logits = logits_of(4, spread=30.0)
    token, _, _ = draw(logits, Sampling(temperature=temperature))
    if temperature < 1:
        assert token == int(logits.argmax())


def test_offsets_are_added_behind_the_repetition_penalty():
    logits = torch.tensor([2.0, 1.9, 0.5])
    added = (torch.tensor([1, 0]), torch.tensor([0.2, -0.05]))
    assert draw(logits, Sampling(), offsets=added)[0] == 1
    halved = Sampling(repetition_penalty=2.0)
    assert draw(logits, halved, torch.tensor([1]), added)[0] == 0
    drawn = counts(logits, offsets=(torch.tensor([0, 1]), torch.tensor([-100.0, -100.0])))
    assert drawn.tolist() == [0, 0, DRAWS]


@pytest.mark.parametrize("parameters", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.5}])
def test_what_the_mask_leaves_out_is_never_drawn(parameters: dict[str, Any]) -> None:
    logits = logits_of(3)
    allowed = torch.zeros(SIZE, dtype=torch.bool)
    allowed[[4, 9, 17]] = True
    drawn = counts(logits, 500, allowed=allowed, **parameters)
    assert set(drawn.nonzero().flatten().tolist()) <= {4, 9, 17}
    best = max([4, 9, 17], key=lambda token: float(logits[token]))
    assert draw(logits, Sampling(), allowed=allowed)[0] == best


def test_logprobs_do_not_know_of_offsets_and_masks():
    logits = logits_of(5)
    plain = draw(logits, Sampling(logprobs=3))
    only = torch.arange(SIZE) == 2
    token, logprob, top = draw(
        logits, Sampling(logprobs=3), None, (torch.tensor([1]), torch.tensor([50.0])), only
    )
    assert token == 2 and top == plain[2]
    assert logprob == pytest.approx(float(torch.log_softmax(logits.double(), -1)[2]))


def test_a_mask_that_allows_nothing_is_an_error():
    with pytest.raises(StepFailed, match="allows no token"):
        draw(logits_of(1), Sampling(), allowed=torch.zeros(SIZE, dtype=torch.bool))
