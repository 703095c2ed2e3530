"""Whole schedules against workers that keep real (if tiny) KV: the text must be the right one."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.requests import Request
from tests.support.toy_chain import ToyModel
from tests.support.toy_shell import Limits, ToyShell

MODELS = {
    "plain": ToyModel(),
    "long-rope": ToyModel(rope_switch=17),
    "dynamic-rope": ToyModel(rope_by_length=True),
}


def random_limits(rng: random.Random) -> Limits:
    block_tokens = rng.choice([1, 3, 4])
    return Limits(
        num_stages=rng.randint(1, 4),
        num_blocks=rng.choice([20, 32, 60, 200]) // block_tokens,
        block_tokens=block_tokens,
        token_budget=rng.choice([1, 3, 8, 32]),
        max_context=rng.choice([18, 36, 48]),
        max_running=rng.choice([1, 3, 8, 8]),
        num_state_slots=rng.choice([0, 0, 0, 3]),
        share_prefixes=rng.random() < 0.8,
        min_chunk_tokens=rng.choice([1, 4]),
    )


def random_request(rng: random.Random, sequence: int, model: ToyModel) -> Request:
    # Few different beginnings, so that many prompts share some of their blocks.
    beginning = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 6], []][rng.randrange(3)]
    prompt = tuple(beginning + [rng.randrange(3) for _ in range(rng.randint(1, 6))])
    scores = rng.choice(["no", "no", "too", "only"])
    return Request(
        sequence,
        prompt,
        max_new_tokens=rng.choice([1, 5, 12, 40]) if scores != "only" else 0,
        eos=frozenset({7}) if rng.random() < 0.5 else frozenset(),
        prompt_salt=model.salt(prompt) or rng.choice([0, 0, 0, "tenant"]),
        scores_prompt=scores != "no",
    )


def run_random_schedule(seed: int, model: ToyModel) -> ToyShell:
    rng = random.Random(seed)
    shell = ToyShell(model, random_limits(rng), rng)
    faults, losses = rng.choice([0.0, 0.0, 0.02]), rng.choice([0.0, 0.0, 0.01])
    for number in range(rng.randint(1, 14)):
        shell.submit(random_request(rng, number, model))
        for _ in range(rng.choice([0, 0, 1, 3, 30])):
            disturb(shell, rng, losses)
            if shell.busy_stages:
                fault_in = rng.randrange(8) if rng.random() < faults else None
                shell.advance(rng.choice(shell.busy_stages), fault_in)
    shell.run_dry()
    return shell


def disturb(shell: ToyShell, rng: random.Random, losses: float) -> None:
    if shell.live and rng.random() < 0.01:
        rng.choice([shell.cancel, shell.stop])(rng.choice(shell.live))
    if rng.random() < losses:
        shell.lose_chain()
    if rng.random() < 0.1:
        shell.deliver_late()
    if shell.live and (not shell.busy_stages or rng.random() < losses / 4):
        shell.restore_chain(rng.randint(1, 3), rng.choice([8, 20, 50]))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("block_of_seeds", range(8))
def test_every_sequence_gets_what_it_would_get_alone(model: ToyModel, block_of_seeds: int) -> None:
    for seed in range(block_of_seeds * 30, block_of_seeds * 30 + 30):
        shell = run_random_schedule(seed, model)
        shell.check_stories()
        stats = shell.scheduler.stats()
        assert stats.running == stats.waiting == 0 and stats.blocks_free == stats.blocks_total


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("block_of_seeds", range(8))
def test_chains_that_come_and_go_change_no_text(model: ToyModel, block_of_seeds: int) -> None:
    """Losses at any event, in a row and during a recovery; late answers; fewer or more stages."""
    restarts = 0
    for seed in range(block_of_seeds * 40, block_of_seeds * 40 + 40):
        rng = random.Random(seed)
        shell = ToyShell(model, random_limits(rng), rng)
        waiting = [random_request(rng, number, model) for number in range(rng.randint(1, 8))]
        for _ in range(rng.choice([20, 60, 200])):
            if waiting and rng.random() < 0.2:
                shell.submit(waiting.pop())
            chance = rng.random()
            if chance < 0.04:
                shell.lose_chain()
            elif chance < 0.08 or (not shell.busy_stages and chance < 0.5):
                shell.restore_chain(rng.randint(1, 4), rng.choice([20, 50, 200]))
            elif chance < 0.15:
                shell.deliver_late()
            elif shell.busy_stages:
                shell.advance(rng.choice(shell.busy_stages))
        for request in waiting:
            shell.submit(request)
        shell.restore_chain(2, 200)
        shell.run_dry()
        shell.check_stories()
        restarts += shell.restarts
    assert restarts > 100


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_text_is_touched_by_what_another_sequence_failed_to_compute(model: ToyModel) -> None:
    """Prompts that share their blocks while those are still in flight, and some of them fail."""
    restarts = 0
    for seed in range(120):
        rng = random.Random(seed)
        budget = rng.choice([2, 3, 8])
        limits = Limits(num_stages=rng.randint(2, 4), num_blocks=60, token_budget=budget)
        shell = ToyShell(model, limits, rng)
        prompt = tuple(range(rng.randint(9, 20)))
        for number in range(6):
            shell.submit(Request(number, prompt, 8, prompt_salt=model.salt(prompt)))
        while shell.busy_stages:
            if shell.live and rng.random() < 0.02:
                shell.cancel(rng.choice(shell.live))
            fault_in = rng.randrange(8) if rng.random() < 0.04 else None
            shell.advance(rng.choice(shell.busy_stages), fault_in)
        shell.check_stories()
        restarts += shell.restarts
    assert restarts > 50


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("block_of_seeds", range(8))
def test_thousands_of_short_lives_of_chains_change_no_text(
    model: ToyModel, block_of_seeds: int
) -> None:
    """As above, and chains that are broken for a while before anybody notices it; users leave."""
    kinds: Counter[str] = Counter()
    for seed in range(block_of_seeds * SHORT_LIVES, (block_of_seeds + 1) * SHORT_LIVES):
        rng = random.Random(10**6 + seed)
        shell = ToyShell(model, random_limits(rng), rng)
        for number in range(rng.randint(1, 4)):
            shell.submit(random_request(rng, number, model))
        for _ in range(rng.randint(5, 40)):
            kind = next(it for it, chance in KINDS_OF_EVENT if rng.random() < chance)
            kinds[kind] += happen(shell, rng, kind)
        shell.run_dry()
        shell.check_stories()
    assert all(kinds[kind] > SHORT_LIVES / 10 for kind, _ in KINDS_OF_EVENT), kinds


SHORT_LIVES = 150  # of each block: 3600 in all
# Each with its chance, if it is none of those before.
KINDS_OF_EVENT = (
    ("lost", 0.06),
    ("broken", 0.06),
    ("restored", 0.1),
    ("late", 0.1),
    ("left", 0.03),
    ("fault", 0.03),
    ("work", 1.0),
)


def happen(shell: ToyShell, rng: random.Random, kind: str) -> bool:
    """One event; False where it cannot be now."""
    if kind == "lost":
        shell.lose_chain()
    elif kind == "broken":
        shell.break_chain()
    elif kind == "restored":
        shell.restore_chain(rng.randint(1, 4), rng.choice([20, 50, 200]))
    elif kind == "late":
        shell.deliver_late()
    elif kind == "left":
        if not shell.live:
            return False
        rng.choice([shell.cancel, shell.stop])(rng.choice(shell.live))
    else:
        if not shell.busy_stages:
            return False
        fault_in = rng.randrange(8) if kind == "fault" else None
        shell.advance(rng.choice(shell.busy_stages), fault_in)
    return True
