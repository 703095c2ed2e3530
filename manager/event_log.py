"""A file that takes a scheduler's events as they come, for `manager replay`.

Knows the file; what stands in it is `engine.event_log`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from engine.event_log import SchedulerSetUp, event_line, header
from engine.requests import Command, Event
from proto.errors import Error, UsageError


class EventLog:
    """An open log; written line by line, so that it is whole up to a crash."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            UsageError: it cannot be written.
        """
        self._path = path
        try:
            self._file: TextIO | None = path.open("w", encoding="utf-8", buffering=1)
        except OSError as exc:
            raise UsageError(f"cannot write --event-log {path}: {exc.strerror}.") from exc
        path.chmod(0o600)  # the prompts and texts of somebody are in it, as token ids
        self.error: Error | None = None  # why it ends early

    def begin(self, set_up: SchedulerSetUp) -> None:
        """How the scheduler is made."""
        self._write(header(set_up))

    def add(self, event: Event, commands: Sequence[Command]) -> None:
        """An event, and what came of it."""
        self._write(event_line(event, commands))

    def close(self) -> None:
        """Nothing follows. Twice does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
        except OSError as exc:  # a full disk is no reason to fail the requests
            self.error = Error(f"--event-log {self._path} ends early: {exc.strerror}")
            self._file = None
