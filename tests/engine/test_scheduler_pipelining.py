"""Whether the stages have work all the time, against stages of which only the time is pretended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.requests import Request, Submitted
from engine.scheduler import Scheduler
from tests.support.timed_chain import TimedChain

NEW_TOKENS = 60


def equal_stages(num_stages: int, fixed_s: float, token_s: float) -> list[Callable[[int], float]]:
    return [lambda num_tokens: fixed_s + token_s * num_tokens] * num_stages


def chain_for(
    stage_s: list[Callable[[int], float]],
    overhead_s: float,
    *,
    max_steps_in_flight: int | None = None,
    token_budget: int = 512,
) -> TimedChain:
    scheduler = Scheduler(
        len(stage_s),
        4096,
        16,
        max_context=4096,
        max_steps_in_flight=max_steps_in_flight,
        token_budget=token_budget,
    )
    return TimedChain(scheduler, stage_s, overhead_s)


def submit(
    chain: TimedChain, count: int, prompt_tokens: int = 20, new_tokens: int = NEW_TOKENS
) -> None:
    for number in range(count):
        prompt = tuple(range(number * prompt_tokens, (number + 1) * prompt_tokens))
        chain.handle(Submitted(Request(number, prompt, new_tokens)))


def decode_phase(chain: TimedChain) -> tuple[float, float]:
    """From when all sequences have their first token until the first one ends."""
    firsts = {number: at_s for at_s, number in reversed(chain.generated)}
    lasts = {number: at_s for at_s, number in chain.generated}
    return max(firsts.values()), min(lasts.values())


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("overhead", [0.02, 0.1, 0.6], ids=lambda share: f"overhead-{share}")
def test_every_stage_works_at_least_85_percent_of_the_decode_phase(
    num_stages: int, overhead: float
) -> None:
    chain = chain_for(equal_stages(num_stages, 0.009, 0.0002), overhead_s=0.010 * overhead)
    submit(chain, 8)
    chain.run_dry()
    assert min(chain.busy_shares(*decode_phase(chain))) >= 0.85


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("overhead", [0.02, 0.1, 1.0], ids=lambda share: f"overhead-{share}")
@pytest.mark.parametrize("num_sequences", [1, 2, 5, 8, 32])
def test_groups_are_never_slower_than_all_sequences_in_one_step(
    num_stages: int, overhead: float, num_sequences: int
) -> None:
    taken_s = []
    for max_steps in (1, None):
        stages = equal_stages(num_stages, 0.006, 0.001)
        chain = chain_for(stages, 0.008 * overhead, max_steps_in_flight=max_steps)
        submit(chain, num_sequences)
        chain.run_dry()
        taken_s.append(chain.now_s)
    assert taken_s[1] <= taken_s[0] * 1.02


def test_one_more_group_than_stages_hides_a_long_way_back() -> None:
    taken_s = []
    for max_steps in (2, None):
        stages = equal_stages(2, 0.002, 0.002)
        chain = chain_for(stages, 0.008, max_steps_in_flight=max_steps)
        submit(chain, 12)
        chain.run_dry()
        taken_s.append(chain.now_s)
    assert taken_s[1] < taken_s[0] * 0.9


def test_a_faster_stage_hides_the_way_back_without_a_further_group() -> None:
    chain = chain_for([lambda _: 0.010, lambda _: 0.006], overhead_s=0.004)
    submit(chain, 8)
    chain.run_dry()
    since_s, until_s = decode_phase(chain)
    assert max(chain.busy_shares(since_s, until_s)) >= 0.98
    assert {p.num_decodes for p in chain.passages if since_s + 0.1 < p.issued_s < until_s} == {4}


@pytest.mark.parametrize(("num_stages", "num_sequences"), [(2, 8), (2, 9), (4, 5), (4, 9), (3, 2)])
def test_groups_that_form_unevenly_become_even(num_stages: int, num_sequences: int) -> None:
    chain = chain_for(equal_stages(num_stages, 0.010, 0.0), overhead_s=0.0001)
    for number in range(num_sequences):  # one after the other, while the first ones decode
        prompt = tuple(range(number * 7, number * 7 + 7))
        chain.handle(Submitted(Request(number, prompt, NEW_TOKENS)))
        for _ in range(number):
            chain.step()
    last_arrival_s = chain.now_s
    chain.run_dry()
    _, end_s = decode_phase(chain)
    steady = [
        passage.num_decodes
        for passage in chain.passages
        if last_arrival_s + 6 * num_stages * 0.010 < passage.issued_s < end_s - 0.1
    ]
    assert len(steady) > 10 and max(steady) - min(steady) <= 1
    groups = min(num_stages, num_sequences)
    for first in range(len(steady) - groups):
        assert sum(steady[first : first + groups]) == num_sequences


def test_groups_become_even_again_when_sequences_end() -> None:
    chain = chain_for(equal_stages(2, 0.010, 0.0), overhead_s=0.0001)
    for number in range(8):
        # Those that decode together at first end together.
        prompt = tuple(range(number * 7, number * 7 + 7))
        chain.handle(Submitted(Request(number, prompt, 20 if number in (0, 1, 2) else 60)))
    chain.run_dry()
    assert [passage.num_decodes for passage in chain.passages[-10:]] == [3, 2] * 5 or [
        passage.num_decodes for passage in chain.passages[-10:]
    ] == [2, 3] * 5


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_lone_long_prompt_keeps_all_stages_at_work(num_stages: int) -> None:
    chain = chain_for(equal_stages(num_stages, 0.002, 0.001), overhead_s=0.001)
    submit(chain, 1, prompt_tokens=1600)
    chain.run_dry()
    first_token_s = chain.generated[0][0]
    chunks = [len(p.command.runs[0].tokens) for p in chain.passages if p.num_decodes == 0]
    assert len(chunks) >= 2 * num_stages and min(chunks) >= 32
    assert max(chunks[:-1]) == min(chunks[:-1]) >= chunks[-1]  # equal pieces, and what is left
    whole_s = num_stages * (0.002 + 1600 * 0.001)
    assert first_token_s < whole_s * (3 * num_stages / (2 * num_stages) / num_stages) * 1.1
    assert min(chain.busy_shares(0.0, first_token_s)) > (0.6 if num_stages > 2 else 0.75)


def test_a_short_prompt_after_a_long_one_is_cut_for_itself() -> None:
    chain = chain_for(equal_stages(2, 0.002, 0.001), overhead_s=0.001)
    submit(chain, 1, prompt_tokens=1600, new_tokens=1)
    chain.run_dry()
    chain.handle(Submitted(Request(1, tuple(range(5000, 5400)), 1)))
    chain.run_dry()
    chunks = [len(p.command.runs[0].tokens) for p in chain.passages]
    assert chunks == [240] * 6 + [160] + [112] * 3 + [64]


def test_a_new_prompt_goes_down_the_pipeline_at_once_beside_full_decode_groups() -> None:
    chain = chain_for(equal_stages(2, 0.010, 0.0), overhead_s=0.0001)
    submit(chain, 8, new_tokens=40)
    while chain.now_s < 0.3:
        chain.step()
    arrived_s = chain.now_s
    chain.handle(Submitted(Request(99, (5, 6, 7), 5)))
    chain.run_dry()
    assert (
        next(p.issued_s for p in chain.passages if p.command.runs[-1].sequence == 99) == arrived_s
    )
