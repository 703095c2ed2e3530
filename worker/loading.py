"""Show on stderr how the loading of a stage goes.

A bar with bytes and rate on a terminal, a log line every few seconds elsewhere. Called from
torch's thread; `percent` is read by the event loop, which tells early managers how far it is.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Final

from worker.logs import fields

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger("comboio.worker")

LINE_EVERY_S: Final = 5.0


class LoadingAborted(Exception):
    """The worker was told to stop while it loaded."""


class Loading:
    """How far the stage is loaded; give `update` to `load_stage` as its progress."""

    def __init__(self) -> None:
        self.percent = 0
        self.is_aborted = False
        self._started_s = self._line_due_s = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show that so many of the section's bytes are here.

        Raises:
            LoadingAborted: there is no use in going on.
        """
        if self.is_aborted:
            raise LoadingAborted
        self.percent = 100 * done_bytes // total_bytes if total_bytes else 100
        if sys.stderr.isatty():
            self._draw(done_bytes, total_bytes)
        elif time.monotonic() >= self._line_due_s or done_bytes == total_bytes:
            self._say(done_bytes, total_bytes)

    def close(self) -> None:
        """Leave the bar as it is; the cursor goes below it."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = _make_bar(total_bytes)
        progress, task = self._bar
        progress.update(task, completed=done_bytes, total=total_bytes)

    def _say(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        self._line_due_s = now + LINE_EVERY_S
        rate = done_bytes / max(now - self._started_s, 1e-9)
        log.info(
            "loading",
            extra=fields(
                percent=self.percent,
                mb=f"{done_bytes / 1e6:.1f}/{total_bytes / 1e6:.1f}",
                mb_per_s=f"{rate / 1e6:.1f}",
            ),
        )


def _make_bar(total_bytes: int) -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("loading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.start()
    return progress, progress.add_task("loading", total=total_bytes)
