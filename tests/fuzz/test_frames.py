"""A hundred thousand damaged frames: each is a frame or a refusal, and nothing else happens."""

from __future__ import annotations

from tests.fuzz.frames import fuzz


def test_damaged_frames_are_read_or_refused_within_the_limits():
    told = fuzz(first=0, count=100_000)
    assert told["cases"] == 100_000
    assert told["frames"] > 1000
    assert told["refused"] > 10_000
