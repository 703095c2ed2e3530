from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.heartbeat import MAX_WAITING_PINGS, Heartbeat


@pytest.fixture
def heartbeat():
    return Heartbeat(missed_limit=3)


def exchange(heartbeat: Heartbeat, *, sent_s: float, rtt_s: float, offset_s: float) -> None:
    """A ping whose answer takes as long there as back, from a clock that is `offset_s` ahead."""
    number = heartbeat.ping(sent_s)
    heartbeat.pong(number, sent_s + rtt_s / 2 + offset_s, sent_s + rtt_s)


def test_a_peer_is_given_up_after_three_silent_beats_in_a_row(heartbeat):
    assert [heartbeat.beat(heard) for heard in (False, False, True)] == [True, True, True]
    assert [heartbeat.beat(False) for _ in range(3)] == [True, True, False]


def test_a_beat_that_comes_late_says_nothing_about_the_peer():
    heartbeat = Heartbeat(missed_limit=2, interval_s=0.1)
    assert heartbeat.beat(False)
    assert all(heartbeat.beat(False, late_s=0.11) for _ in range(5))  # it was we who slept
    assert not heartbeat.beat(False, late_s=0.1)


def test_nothing_is_known_of_the_peer_before_its_first_answer(heartbeat):
    heartbeat.ping(1.0)
    assert (heartbeat.rtt_s, heartbeat.clock_offset_s) == (None, None)


def test_the_round_trip_is_smoothed(heartbeat):
    exchange(heartbeat, sent_s=1.0, rtt_s=0.008, offset_s=0)
    assert heartbeat.rtt_s == pytest.approx(0.008)
    exchange(heartbeat, sent_s=2.0, rtt_s=0.016, offset_s=0)
    assert heartbeat.rtt_s == pytest.approx(0.009)


def test_the_clock_offset_comes_from_the_fastest_exchange(heartbeat):
    exchange(heartbeat, sent_s=1.0, rtt_s=0.002, offset_s=100.0)
    number = heartbeat.ping(2.0)
    heartbeat.pong(number, 102.0, 2.5)  # it took 0.5 s to come back
    assert heartbeat.clock_offset_s == pytest.approx(100.0)


def test_an_offset_that_drifted_is_learnt_anew(heartbeat):
    exchange(heartbeat, sent_s=0, rtt_s=0.001, offset_s=100.0)
    for second in range(1, 65):
        exchange(heartbeat, sent_s=second, rtt_s=0.002, offset_s=200.0)
    assert heartbeat.clock_offset_s == pytest.approx(200.0)


def test_an_answer_to_no_ping_of_ours_changes_nothing(heartbeat):
    number = heartbeat.ping(1.0)
    assert heartbeat.pong(number + 1, 5.0, 2.0) is None
    assert heartbeat.pong(number, 5.0, 2.0) == 1.0
    assert heartbeat.pong(number, 5.0, 3.0) is None
    assert heartbeat.rtt_s == 1.0


def test_pings_without_answer_are_forgotten_oldest_first(heartbeat):
    numbers = [heartbeat.ping(1.0) for _ in range(MAX_WAITING_PINGS + 1)]
    assert heartbeat.pong(numbers[0], 0.0, 2.0) is None
    assert heartbeat.pong(numbers[1], 0.0, 2.0) == 1.0


@given(rtts=st.lists(st.floats(0, 10), min_size=1, max_size=100), offset_s=st.floats(-1e6, 1e6))
def test_the_error_of_the_offset_is_at_most_half_the_fastest_round_trip(rtts, offset_s):
    heartbeat = Heartbeat(missed_limit=3)
    for second, rtt_s in enumerate(rtts):
        number = heartbeat.ping(second)
        heartbeat.pong(
            number, second + offset_s, second + rtt_s
        )  # all of the delay on the way back
    assert heartbeat.clock_offset_s is not None
    assert abs(heartbeat.clock_offset_s - offset_s) <= min(rtts[-64:]) / 2 + 1e-6
