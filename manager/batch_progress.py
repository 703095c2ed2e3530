"""How far a batch is: rows, tokens a second, time left. A bar on a terminal, a line now and then
elsewhere.

Knows terminals and the clock; the batch tells it what happened.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final

from manager.output import Notices

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_EVERY_S: Final = 10.0
REDRAW_EVERY_S: Final = 0.1


class BatchProgress:
    """Shown while the block runs."""

    def __init__(self, num_rows: int, notices: Notices) -> None:
        self._num_rows, self._notices = num_rows, notices
        self._started_s = self._shown_s = time.monotonic()
        self._rows_done = 0
        self._tokens = 0
        self._running: dict[int, float] = {}  # row -> how much of it is there, at least
        self._bar: _Bar | None = None

    def __enter__(self) -> BatchProgress:
        self._started_s = self._shown_s = time.monotonic()
        if sys.stderr.isatty():
            self._bar = _Bar(self._num_rows)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def tokens_came(self, row: int, count: int, max_new_tokens: int) -> None:
        """A row that runs got some more tokens; it may end before its most."""
        self._tokens += count
        self._running[row] = self._running.get(row, 0.0) + count / max_new_tokens
        self._show(REDRAW_EVERY_S if self._bar is not None else LINE_EVERY_S)

    def row_done(self, row: int) -> None:
        """A row is over."""
        self._rows_done += 1
        self._running.pop(row, None)
        self._show(0.0 if self._bar is not None else LINE_EVERY_S)

    def words(self, elapsed_s: float) -> str:
        """Tokens a second and time left."""
        parts = [f"{self._tokens / elapsed_s:.1f} tokens/s"] if elapsed_s > 0 else []
        left_s = self._left_s(elapsed_s)
        if left_s is not None:
            parts.append(f"about {duration(left_s)} left")
        return ", ".join(parts)

    def _left_s(self, elapsed_s: float) -> float | None:
        done = self._rows_done + sum(self._running.values())
        return elapsed_s * (self._num_rows - done) / done if done else None

    def _show(self, every_s: float) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < every_s:
            return
        self._shown_s = now_s
        words = self.words(now_s - self._started_s)
        if self._bar is not None:
            self._bar.show(self._rows_done, words)
        else:
            self._notices.say(f"{self._rows_done} of {self._num_rows} rows, {words}")


class _Bar:
    """The bar on a terminal."""

    def __init__(self, num_rows: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress: Progress = Progress(
            MofNCompleteColumn(),
            TextColumn("rows"),
            BarColumn(bar_width=30),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("", total=num_rows)
        self._progress.start()
        self.close: Callable[[], None] = self._progress.stop

    def show(self, rows_done: int, words: str) -> None:
        self._progress.update(self._task, completed=rows_done, description=words)


def duration(seconds: float) -> str:
    """59 s, 3 min, 2 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
