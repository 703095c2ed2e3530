"""Some seconds of mixed requests while workers are killed; `bench/soak.py` does it for minutes."""

from __future__ import annotations

from bench.soak import soak
from tests.support.fleet import Fleet
from tests.support.forked_workers import Nursery


async def test_no_request_fails_while_workers_are_killed_and_frozen(tiny):
    with Nursery() as nursery:
        fleet = Fleet(nursery, tiny.folder, "64MB")
        figures = await soak(fleet, duration_s=15, streams=4, every_s=1.5, seed=1)
    assert figures.failed == 0, figures.errors
    assert figures.kills >= 3
    assert figures.requests > figures.kills
