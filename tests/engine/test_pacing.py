"""How many groups the measured times ask for."""

from __future__ import annotations

from engine.pacing import MEASURE_EVERY_STEPS, Pacer


def observe(pacer: Pacer, count: int, stage_s: tuple[float, ...], elapsed_s: float) -> int:
    for _ in range(count):
        pacer.observe(stage_s, elapsed_s)
    return pacer.groups


def test_without_measurements_there_are_as_many_groups_as_stages() -> None:
    assert Pacer(3, 4).groups == 3
    assert observe(Pacer(3, 4), 1000, (), 5.0) == 3


def test_a_short_way_back_needs_no_further_group() -> None:
    assert observe(Pacer(2, 3), 1000, (0.010, 0.010), 0.0215) == 2


def test_a_long_way_back_is_hidden_by_one_more_group() -> None:
    assert observe(Pacer(2, 3), 100, (0.010, 0.010), 0.026) == 3


def test_the_first_slow_steps_decide_nothing() -> None:
    pacer = Pacer(2, 3)
    assert observe(pacer, 10, (0.010, 0.030), 0.090) == 2
    assert observe(pacer, 100, (0.010, 0.010), 0.021) == 2


def test_waiting_behind_a_slow_stage_is_no_way_back() -> None:
    # Elapsed is a whole round of the slowest stage; half of it is queueing before that stage.
    assert observe(Pacer(3, 4), 1000, (0.010, 0.002, 0.002), 0.030) == 3


def test_groups_never_exceed_the_steps_that_may_be_in_flight() -> None:
    assert Pacer(4, 2).groups == 2
    assert observe(Pacer(2, 2), 100, (0.010, 0.010), 0.090) == 2


def test_a_way_back_that_became_short_is_noticed() -> None:
    pacer = Pacer(2, 3)
    assert observe(pacer, 100, (0.010, 0.010), 0.040) == 3
    # In three groups the steps queue for a third stage time: nothing to be learnt from that.
    assert observe(pacer, 100, (0.010, 0.010), 0.030) == 3
    assert observe(pacer, MEASURE_EVERY_STEPS, (0.010, 0.010), 0.030) in (2, 3)
    assert observe(pacer, 2 * MEASURE_EVERY_STEPS, (0.010, 0.010), 0.0205) == 2
