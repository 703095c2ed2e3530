"""The trace file: what it says of each step, and that it opens however the run ended."""

from __future__ import annotations

import json
import os
import time

import pytest

from manager.trace import open_trace
from proto.errors import UsageError
from proto.messages import StepReport
from tests.support.traces import read_trace

LEASE = bytes(16)


@pytest.fixture
def start_s() -> float:
    """When the first step is issued: after the test opened its trace."""
    return time.monotonic() + 1


def report(step, received_s, started_s, finished_s, sent_s, num_tokens=1):
    return StepReport(
        lease=LEASE,
        step=step,
        num_tokens=num_tokens,
        received_s=received_s,
        started_s=started_s,
        finished_s=finished_s,
        sent_s=sent_s,
    )


def test_a_step_has_its_times_in_the_manager_and_in_every_worker(tmp_path, start_s):
    trace = open_trace(tmp_path / "t.json")
    trace.step_issued(0, start_s, 40)
    trace.report(
        "a:1",
        report(0, start_s + 0.001, start_s + 0.002, start_s + 0.022, start_s + 0.023, 40),
        0.0,
    )
    trace.report(
        "b:2",
        report(0, start_s + 0.024, start_s + 0.025, start_s + 0.045, start_s + 0.046, 40),
        0.0,
    )
    trace.step_returned(0, start_s + 0.047, [0.02, 0.02])
    trace.close()
    view = read_trace(tmp_path / "t.json")
    assert view.tokens == {0: 40}
    assert view.returned_us[0] - view.issued_us[0] == pytest.approx(47_000, abs=0.2)
    assert set(view.lanes) == {"a:1", "b:2"}
    first = view.lanes["a:1"]
    assert [round(end - start) for start, end in (first[it][0] for it in LANES)] == [
        1000,
        20_000,
        1000,
    ]
    # Both ends are rounded to a tenth of a microsecond.
    assert first["queue"][0][0] - view.issued_us[0] == pytest.approx(1000, abs=0.2)


LANES = ("queue", "compute", "send")


def test_a_worker_s_clock_is_put_into_the_manager_s(tmp_path, start_s):
    trace = open_trace(tmp_path / "t.json")
    trace.step_issued(0, start_s, 1)
    theirs = start_s + 7000
    trace.report(
        "a:1", report(0, theirs + 0.5, theirs + 0.5, theirs + 1, theirs + 1), clock_offset_s=7000
    )
    trace.step_returned(0, start_s + 1.5, [0.5])
    trace.close()
    view = read_trace(tmp_path / "t.json")
    start, end = view.lanes["a:1"]["compute"][0]
    assert start - view.issued_us[0] == pytest.approx(500_000)
    assert view.returned_us[0] - end == pytest.approx(500_000)


def test_slices_of_one_worker_do_not_overlap_when_its_offset_moves(tmp_path, start_s):
    trace = open_trace(tmp_path / "t.json")
    for step in (0, 1):
        trace.step_issued(step, start_s + step, 1)
    trace.report("a:1", report(0, start_s + 50, start_s + 50, start_s + 51, start_s + 51), 50.0)
    trace.report(
        "a:1", report(1, start_s + 51, start_s + 51, start_s + 52, start_s + 52), 50.1
    )  # measured anew
    for step in (0, 1):
        trace.step_returned(step, start_s + 3 + step, [])
    trace.close()
    computes = read_trace(tmp_path / "t.json").lanes["a:1"]["compute"]
    assert computes[0][1] <= computes[1][0] <= computes[1][1]


def test_a_trace_that_was_never_closed_opens_once_a_bracket_is_added(tmp_path, start_s):
    trace = open_trace(tmp_path / "t.json")
    trace.step_issued(0, start_s, 1)
    trace.step_returned(0, start_s + 1, [])
    trace._stream.flush()  # what a second's wait does
    events = json.loads((tmp_path / "t.json").read_text() + "]")
    assert [it["ph"] for it in events if it["name"] == "step"] == ["b", "e"]
    trace.close()


def test_a_trace_without_a_step_is_a_whole_file_and_closes_twice(tmp_path):
    trace = open_trace(tmp_path / "t.json")
    trace.close()
    trace.close()
    trace.step_issued(0, 1.0, 1)  # comes too late, does no harm
    assert read_trace(tmp_path / "t.json").tokens == {}


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--trace .*none.*cannot be written: No such file"):
        open_trace(tmp_path / "none" / "t.json")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_ends_the_trace_and_not_the_run(capsys):
    from pathlib import Path

    trace = open_trace(Path("/dev/full"))
    for step in range(1000):
        trace.step_issued(step, float(step), 1)
        trace.step_returned(step, step + 0.5, [])
    trace.close()
    assert trace.error is not None
    said = capsys.readouterr().err
    assert said == "manager: --trace /dev/full ends early: No space left on device\n"
