"""A trace of every served request: when its steps were where, for ui.perfetto.dev.

Remembers the latest steps of the pipeline; when a request is over, those of its time go into a file
of its own, beside a lane of the request itself. Old files make room for new ones.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from manager.serve.log import Log
from manager.trace import TraceFile
from proto.errors import UsageError
from proto.messages import StepReport

MAX_EVENTS: Final = 200_000  # of the past, some 40 MB
MAX_FILES: Final = 1000
# What the workers report of the last step comes a little later than its tokens.
LATE_S: Final = 0.5

Issued = tuple[int, float, int]
Returned = tuple[int, float, tuple[float, ...]]
Reported = tuple[str, StepReport, float]


class RequestTraces:
    """`manager.dispatcher.Trace`, of which each request gets its part."""

    def __init__(self, folder: Path, log: Log) -> None:
        """
        Raises:
            UsageError: the folder cannot be made.
        """
        self._folder, self._log = folder, log
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--trace-dir {folder} cannot be made: {exc.strerror}.") from exc
        self._events: deque[tuple[float, Issued | Returned | Reported]] = deque(maxlen=MAX_EVENTS)
        self._waiting: set[asyncio.TimerHandle] = set()

    # --- what the pipeline tells -------------------------------------------------------------

    def step_issued(self, step: int, at_s: float, num_tokens: int) -> None:
        """A step goes to the first worker now."""
        self._events.append((at_s, (step, at_s, num_tokens)))

    def step_returned(self, step: int, at_s: float, stage_s: Sequence[float]) -> None:
        """Its tokens are here."""
        self._events.append((at_s, (step, at_s, tuple(stage_s))))

    def report(self, worker: str, report: StepReport, clock_offset_s: float) -> None:
        """When a step passed the worker."""
        self._events.append((report.received_s - clock_offset_s, (worker, report, clock_offset_s)))

    def close(self) -> None:
        """The pipeline is gone; the next one goes on."""

    # --- what the server tells ---------------------------------------------------------------

    def request_ended(
        self, request_id: str, started_s: float, first_s: float | None, ended_s: float
    ) -> None:
        """Its file is written soon."""
        loop = asyncio.get_running_loop()

        def write() -> None:
            self._waiting.discard(handle)
            self._write(request_id, started_s, first_s, ended_s)

        handle = loop.call_later(LATE_S, write)
        self._waiting.add(handle)

    def _write(
        self, request_id: str, started_s: float, first_s: float | None, ended_s: float
    ) -> None:
        path = self._folder / f"{request_id.replace(':', '_')}.json"
        try:
            self._make_room()
            with path.open("w", encoding="utf-8") as stream:
                trace = TraceFile(path, stream, origin_s=started_s)
                trace.request(request_id, started_s, first_s, ended_s)
                begun: set[int] = set()
                for at_s, said in tuple(self._events):
                    if started_s <= at_s <= ended_s:
                        _tell(trace, said, begun)
                trace.close()
        except OSError as exc:
            self._log("trace not written", id=request_id, error=exc.strerror)

    def _make_room(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda it: it.stat().st_mtime)
        for old in files[: max(0, len(files) - MAX_FILES + 1)]:
            old.unlink(missing_ok=True)


def _tell(trace: TraceFile, said: Issued | Returned | Reported, begun: set[int]) -> None:
    first, second, third = said
    if isinstance(first, str):
        assert isinstance(second, StepReport) and isinstance(third, float)
        trace.report(first, second, third)
    elif isinstance(third, int):
        assert isinstance(second, float)
        begun.add(first)
        trace.step_issued(first, second, third)
    elif first in begun:  # one that was on its way before has no beginning here
        assert isinstance(second, float) and isinstance(third, tuple)
        trace.step_returned(first, second, third)
