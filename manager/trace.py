"""Write when each step was where, as a trace that Perfetto and chrome://tracing open.

The file is a JSON array of trace events, written as they happen: a file that ends in the middle
of a run opens as well, only the closing bracket is missing. Lanes:

- manager: every step from its issue to its return, and how many are in flight;
- each worker: `queue` (the frame is here, torch is busy), `compute` (torch works) and `send`
  (the result waits for the event loop and the socket).

Workers tell times of their own monotonic clock; the offset that the link measured maps them onto
the manager's. Knows no scheduler and no link: `manager.dispatcher` and `manager.pipeline` call it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from manager.cli import say
from proto.errors import UsageError
from proto.messages import StepReport

MANAGER_PID: Final = 0  # workers are numbered from 1 as they first report
STEPS_LANE: Final = 0
REQUEST_LANE: Final = 4  # of the manager, in the trace of one served request
QUEUE_LANE, COMPUTE_LANE, SEND_LANE = 1, 2, 3
LANES: Final = {QUEUE_LANE: "queue", COMPUTE_LANE: "compute", SEND_LANE: "send"}
FLUSH_EVERY_S: Final = 1.0  # so much of the trace is lost if the manager is killed

Event = dict[str, Any]


class TraceFile:
    """A trace that is being written; `manager.dispatcher.Trace`. Made by `open_trace`."""

    def __init__(self, path: Path, stream: TextIO, *, origin_s: float | None = None) -> None:
        """`origin_s` is where the trace's time begins, by the monotonic clock; None: now."""
        self.path = path
        self.error: OSError | None = None  # why the trace ends early; the run goes on without it
        self._stream = stream
        self._flushed_s = time.monotonic()
        self._origin_s = self._flushed_s if origin_s is None else origin_s
        self._is_first = True
        self._num_in_flight = 0
        self._lanes: dict[str, _WorkerLanes] = {}
        self._name_lane(MANAGER_PID, "manager", {STEPS_LANE: "steps", REQUEST_LANE: "request"})

    # --- what is told ------------------------------------------------------------------------

    def step_issued(self, step: int, at_s: float, num_tokens: int) -> None:
        """A step goes to the first worker now."""
        self._num_in_flight += 1
        self._span_begins(MANAGER_PID, STEPS_LANE, "step", step, at_s, {"tokens": num_tokens})
        self._count_in_flight(at_s)

    def step_returned(self, step: int, at_s: float, stage_s: Sequence[float]) -> None:
        """Its tokens are here; `stage_s` are the stages' compute seconds, in order."""
        self._num_in_flight -= 1
        arguments = {"compute_ms": [round(1000 * seconds, 3) for seconds in stage_s]}
        self._span_ends(MANAGER_PID, STEPS_LANE, "step", step, at_s, arguments)
        self._count_in_flight(at_s)

    def report(self, worker: str, report: StepReport, clock_offset_s: float) -> None:
        """When a step passed the worker at this address, by its own clock: ours plus the offset."""
        lanes = self._lanes.get(worker)
        if lanes is None:
            lanes = self._lanes[worker] = _WorkerLanes(MANAGER_PID + 1 + len(self._lanes))
            self._name_lane(lanes.pid, f"worker {worker}", LANES)
        received_s, started_s, finished_s, sent_s = lanes.ours(report, clock_offset_s)
        step, arguments = report.step, {"step": report.step, "tokens": report.num_tokens}
        self._span_begins(lanes.pid, QUEUE_LANE, "queue", step, received_s, arguments)
        self._span_ends(lanes.pid, QUEUE_LANE, "queue", step, started_s)
        self._write(
            {
                "ph": "X",
                "name": f"step {step}",
                "cat": "compute",
                "pid": lanes.pid,
                "tid": COMPUTE_LANE,
                "ts": self._us(started_s),
                "dur": round(1e6 * (finished_s - started_s), 1),
                "args": arguments,
            }
        )
        self._span_begins(lanes.pid, SEND_LANE, "send", step, finished_s, arguments)
        self._span_ends(lanes.pid, SEND_LANE, "send", step, sent_s)

    def request(self, name: str, at_s: float, first_s: float | None, end_s: float) -> None:
        """A request from its coming to its first token, and to its end."""
        parts = [("until the first token", at_s, first_s or end_s)]
        if first_s is not None:
            parts.append(("tokens", first_s, end_s))
        for what, start_s, stop_s in parts:
            self._write(
                {
                    "ph": "X",
                    "name": what,
                    "cat": "request",
                    "pid": MANAGER_PID,
                    "tid": REQUEST_LANE,
                    "ts": self._us(start_s),
                    "dur": round(1e6 * (stop_s - start_s), 1),
                    "args": {"request": name},
                }
            )

    def close(self) -> None:
        """Nothing follows. Twice does no harm."""
        if self._stream.closed:
            return
        try:
            if self.error is None:
                self._stream.write("\n]\n")
            self._stream.close()
        except OSError as exc:
            self._give_up(exc)

    # --- events ------------------------------------------------------------------------------

    def _span_begins(
        self, pid: int, tid: int, name: str, step: int, at_s: float, arguments: Event
    ) -> None:
        # Asynchronous events: steps in a queue overlap, which plain slices of one lane must not.
        self._span("b", pid, tid, name, step, at_s, arguments)

    def _span_ends(
        self, pid: int, tid: int, name: str, step: int, at_s: float, arguments: Event | None = None
    ) -> None:
        self._span("e", pid, tid, name, step, at_s, arguments or {})

    def _span(
        self, phase: str, pid: int, tid: int, name: str, step: int, at_s: float, arguments: Event
    ) -> None:
        self._write(
            {
                "ph": phase,
                "name": name,
                "cat": name,
                "id": f"{pid}.{step}",
                "pid": pid,
                "tid": tid,
                "ts": self._us(at_s),
                "args": arguments,
            }
        )

    def _count_in_flight(self, at_s: float) -> None:
        self._write(
            {
                "ph": "C",
                "name": "steps in flight",
                "pid": MANAGER_PID,
                "ts": self._us(at_s),
                "args": {"steps": self._num_in_flight},
            }
        )

    def _name_lane(self, pid: int, process: str, lanes: dict[int, str]) -> None:
        names: list[tuple[str, int, Event]] = [("process_name", 0, {"name": process})]
        names.append(("process_sort_index", 0, {"sort_index": pid}))
        names += [("thread_name", tid, {"name": lane}) for tid, lane in lanes.items()]
        for name, tid, arguments in names:
            self._write({"ph": "M", "name": name, "pid": pid, "tid": tid, "args": arguments})

    def _us(self, at_s: float) -> float:
        return round(1e6 * (at_s - self._origin_s), 1)

    def _write(self, event: Event) -> None:
        """One event, one line. A full disk ends the trace, not the run."""
        if self.error is not None or self._stream.closed:
            return
        try:
            self._stream.write("[\n" if self._is_first else ",\n")
            self._stream.write(json.dumps(event, separators=(",", ":")))
            self._is_first = False
            now_s = time.monotonic()
            if now_s - self._flushed_s > FLUSH_EVERY_S:
                self._stream.flush()
                self._flushed_s = now_s
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        if self.error is None:
            self.error = exc
            say(f"--trace {self.path} ends early: {exc.strerror}")


class _WorkerLanes:
    """One worker's place in the trace, and its clock."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._last_finished_s = 0.0

    def ours(self, report: StepReport, clock_offset_s: float) -> tuple[float, float, float, float]:
        """(received, started, finished, sent) by the manager's clock, in this order."""
        received_s = report.received_s - clock_offset_s
        # The offset is measured again and again; when it moves a little, two slices of torch's
        # one thread must still not overlap.
        started_s = max(report.started_s - clock_offset_s, received_s, self._last_finished_s)
        finished_s = max(report.finished_s - clock_offset_s, started_s)
        self._last_finished_s = finished_s
        return received_s, started_s, finished_s, max(report.sent_s - clock_offset_s, finished_s)


def open_trace(path: Path) -> TraceFile:
    """Start a trace file; one that is there is replaced.

    Raises:
        UsageError: no file can be made there.
    """
    try:
        stream = path.open("w", encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"--trace {path} cannot be written: {exc.strerror}.") from exc
    return TraceFile(path, stream)
