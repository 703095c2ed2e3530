"""A log of events has the scheduler decide the same again."""

from __future__ import annotations

import random
from functools import cache

import pytest

from engine.event_log import SchedulerSetUp, event_line, header, replay
from proto.errors import RemoteProtocolError, UsageError
from tests.engine.test_scheduler_simulation import disturb, random_request
from tests.support.toy_chain import ToyModel
from tests.support.toy_shell import Limits, ToyShell


def log_of(shell: ToyShell, limits: Limits) -> list[str]:
    set_up = SchedulerSetUp(
        num_stages=limits.num_stages,
        num_blocks=limits.num_blocks,
        block_tokens=limits.block_tokens,
        max_context=limits.max_context,
        token_budget=limits.token_budget,
        rope_switch=shell.model.rope_switch,
    )
    lines = [header(set_up), *(event_line(event, commands) for event, commands in shell.log)]
    return [line + "\n" for line in lines]


@cache
def logs() -> list[list[str]]:
    """Of schedulers that were made with nothing but what a log says of them."""
    found = []
    for seed in range(12):
        rng = random.Random(seed)
        limits = Limits(token_budget=4, max_running=256, num_stages=rng.randint(1, 3))
        shell = ToyShell(ToyModel(rope_switch=17), limits, rng)
        for number in range(6):
            shell.submit(random_request(rng, number, shell.model))
            for _ in range(rng.choice([1, 3, 20])):
                disturb(shell, rng, losses=0.1)
                if shell.busy_stages:
                    shell.advance(rng.choice(shell.busy_stages))
        shell.run_dry()
        found.append(log_of(shell, limits))
    return found


def test_a_replayed_log_gives_the_same_commands() -> None:
    assert any("TopologyLost" in line for lines in logs() for line in lines)
    for lines in logs():
        assert all(it.is_same for it in replay(lines))


def test_a_change_in_an_event_shows_at_its_line() -> None:
    """In most logs: a sequence whose user left at once would not have had a second token."""
    shown = []
    for lines in logs():
        for at, line in enumerate(lines):
            changed = line.replace('"max_new_tokens":12', '"max_new_tokens":1')
            if changed != line:
                shown.append(differs([*lines[:at], changed, *lines[at + 1 :]]))
    assert len(shown) > 4 and sum(shown) > len(shown) / 2


def differs(lines: list[str]) -> bool:
    try:
        return not all(it.is_same for it in replay(lines))
    except RemoteProtocolError:  # an answer to a step that was never begun
        return True


def test_a_line_that_ends_early_is_left_out() -> None:
    lines = logs()[0]
    assert len(list(replay([*lines[:5], lines[5][:9]]))) == 4


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "line 1 does not begin a log"),
        (["fox\n"], "line 1 does not begin a log"),
        (["{}\n"], "line 1 does not begin a log"),
        (["[1]\n"], "line 1 does not begin a log"),
    ],
)
def test_what_is_no_log_is_refused(lines: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list(replay(lines))


@pytest.mark.parametrize(
    "line",
    ["fox\n", "[]\n", "{}\n", '{"event":"Guess","commands":""}\n', '{"event":"Cancelled"}\n'],
)
def test_a_line_that_is_no_event_is_named(line: str) -> None:
    first = logs()[0][0]
    with pytest.raises(UsageError, match="line 2 is no event of a scheduler"):
        list(replay([first, line]))
