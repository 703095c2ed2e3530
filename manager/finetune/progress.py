"""Show a fine-tuning job: a bar that moves on a terminal, plain lines elsewhere.

Lines are flushed as they come, so that `manager logs -f` shows them. Knows events and a terminal,
no model.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from engine.jobs.events import Event, Finished, Started, Stepped, Validated

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from engine.jobs.run_log import LineWriter


class Shown:
    """What stderr shows of one job. A context manager."""

    def __init__(self, log_steps: int, memory_steps: int) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._steps = (log_steps, memory_steps)
        self._lines: LineWriter | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._busy = ""

    def __enter__(self) -> Shown:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_bar()

    def busy(self, text: str) -> None:
        """What is going on now; on a terminal until something else is."""
        if self._is_terminal:
            self._bar(text, None)
            return
        what = text.partition(":")[0]  # "reading data: 512 samples" is one line, not many
        if what != self._busy:
            self._busy = what
            self._print(what)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(line)

    def event(self, event: Event) -> None:
        """Move the bar, or write the lines that the log has."""
        from engine.jobs.run_log import LineWriter, describe

        if self._lines is None:
            self._lines = LineWriter(*self._steps)
        lines = self._lines.of(event)
        if not self._is_terminal:
            for line in lines:
                self._print(line)
            return
        match event:
            case Started():
                self.say(describe(event))
                self._stop_bar()
                self._bar("training", event.total_steps, completed=event.step)
            case Stepped():
                text = f"loss {event.loss:.4f}, {event.tokens_per_s:.0f} tokens/s"
                self._move(event.step, text)
            case Finished():
                self._stop_bar()
                self.say(describe(event))
            case Validated():
                self.say(describe(event))

    def _bar(self, text: str, total: float | None, completed: int = 0) -> None:
        if self._progress is None or self._task is None:
            self._progress = _make_bar(counts=total is not None)
            self._task = self._progress.add_task(text, total=total, completed=completed, loss="")
            self._progress.start()
        self._progress.update(self._task, description=text, total=total, completed=completed)

    def _move(self, completed: float, loss: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed, loss=loss)

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _print(self, line: str) -> None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            pass  # nobody reads it


def _make_bar(*, counts: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns: list[ProgressColumn] = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
    ]
    if counts:
        columns += [
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}", markup=False),
            TimeRemainingColumn(),
        ]
    return Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
