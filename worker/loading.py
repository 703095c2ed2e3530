"""Show on stderr how the loading of a stage goes, and the staging before it.

A bar with bytes and rate on a terminal, a log line every few seconds elsewhere. Called from
torch's thread; `percent` is read by the event loop, which tells early managers how far it is.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker.logs import fields

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from engine.staging import Staged

log = logging.getLogger("comboio.worker")

LINE_EVERY_S: Final = 5.0


class LoadingAborted(Exception):
    """The worker was told to stop while it loaded."""


class Loading:
    """How far the stage is loaded.

    Give `update` to `load_stage` as its progress, and the whole to `Staging` as its watch.
    """

    def __init__(self) -> None:
        self.percent = 0  # of all bytes to be moved; those that are staged move twice
        self.is_aborted = False
        self._staged_percent = 0  # where loading begins
        self._phase = "loading"
        self._started_s = self._line_due_s = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show that so many of the section's bytes are here.

        Raises:
            LoadingAborted: there is no use in going on.
        """
        self._go_on("loading")
        share = _percent(done_bytes, total_bytes)
        self.percent = self._staged_percent + (100 - self._staged_percent) * share // 100
        self._show(done_bytes, total_bytes)

    def copying(self, done_bytes: int, total_bytes: int) -> None:
        """Show that so many of the section's bytes are copied to the staging folder.

        Raises:
            LoadingAborted: there is no use in going on.
        """
        self._go_on("staging")
        self.percent = _percent(done_bytes, total_bytes) // 2
        self._show(done_bytes, total_bytes)

    def waiting(self, folder: Path) -> None:
        """Show that another worker is at work on the copy that this one wants.

        Raises:
            LoadingAborted: there is no use in going on.
        """
        self._go_on("waiting")
        if time.monotonic() >= self._line_due_s:
            self._line_due_s = time.monotonic() + LINE_EVERY_S
            log.info("waiting for another worker's copy", extra=fields(folder=folder))

    def staged(self, done: Staged) -> None:
        """Say what the copy took."""
        self.close()
        self._started_s = time.monotonic()
        if not done.copied_bytes:
            log.info(
                "staged copy reused",
                extra=fields(folder=done.folder, mb=f"{done.slice_bytes / 1e6:.1f}"),
            )
            return
        self._staged_percent = 50
        log.info(
            "staged",
            extra=fields(
                folder=done.folder,
                bytes=done.copied_bytes,
                seconds=f"{done.elapsed_s:.2f}",
                mb_per_s=f"{done.copied_bytes / max(done.elapsed_s, 1e-9) / 1e6:.1f}",
            ),
        )
        if done.is_same_disk:
            log.warning(
                "--stage-to names a folder on the model's own file system: nothing is gained",
                extra=fields(folder=done.folder),
            )

    def close(self) -> None:
        """Leave the bar as it is; the cursor goes below it."""
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def _go_on(self, phase: str) -> None:
        if self.is_aborted:
            raise LoadingAborted
        if phase != self._phase:
            self.close()
            self._phase = phase
            self._started_s = self._line_due_s = time.monotonic()

    def _show(self, done_bytes: int, total_bytes: int) -> None:
        if sys.stderr.isatty():
            self._draw(done_bytes, total_bytes)
        elif time.monotonic() >= self._line_due_s or done_bytes == total_bytes:
            self._say(done_bytes, total_bytes)

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = _make_bar(self._phase, total_bytes)
        progress, task = self._bar
        progress.update(task, completed=done_bytes, total=total_bytes)

    def _say(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        self._line_due_s = now + LINE_EVERY_S
        rate = done_bytes / max(now - self._started_s, 1e-9)
        log.info(
            self._phase,
            extra=fields(
                percent=_percent(done_bytes, total_bytes),
                mb=f"{done_bytes / 1e6:.1f}/{total_bytes / 1e6:.1f}",
                mb_per_s=f"{rate / 1e6:.1f}",
            ),
        )


def _percent(done_bytes: int, total_bytes: int) -> int:
    return 100 * done_bytes // total_bytes if total_bytes else 100


def _make_bar(phase: str, total_bytes: int) -> tuple[Progress, TaskID]:
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
        TextColumn(phase),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.start()
    return progress, progress.add_task(phase, total=total_bytes)
