"""Whole sessions of a peer that keeps no rule, against real workers, beside an honest manager."""

from __future__ import annotations

import pytest

from tests.fuzz.sessions import two_workers

SESSIONS = 600


async def test_rude_peers_crash_nothing_and_change_nobody_s_tokens(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with two_workers(tmp_path_factory.mktemp("fuzz")) as fuzzer:
        await fuzzer.run(first=0, count=SESSIONS)
    told = fuzzer.told
    assert told.sessions == SESSIONS
    # They got somewhere, and were cut off where they had to be.
    assert told.steps_done > SESSIONS / 2
    assert told.cut_off > SESSIONS / 10
    assert told.honest_rounds > 10
