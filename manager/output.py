"""What people see: text on stdout as it comes, and on stderr what is going on.

Knows terminals, no pipeline. Writing never blocks the event loop, so that a paused terminal does
not look like a dead manager to the workers.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from typing import TYPE_CHECKING, Any, TextIO

from manager.generation import Completion
from proto.messages import WorkerFacts

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class TextWriter:
    """Writes text to a stream from a thread of its own, each piece flushed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # Bounded by what a request may generate.
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._ended = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        # A daemon: whoever does not read must not keep the process from leaving.
        self._thread = threading.Thread(target=self._work, name="stdout", daemon=True)
        self._thread.start()
        self.last_char = ""

    def write(self, text: str) -> None:
        """Show a piece soon.

        Raises:
            BrokenPipeError, OSError: an earlier piece could not be written.
        """
        if self._error is not None:
            raise self._error
        if text:
            self.last_char = text[-1]
            self._texts.put(text)

    async def close(self) -> None:
        """Wait until all is written.

        Raises:
            BrokenPipeError, OSError: it could not be.
        """
        self._texts.put(None)
        await self._ended
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (text := self._texts.get()) is not None:
            if self._error is None:
                try:
                    self._write(text)
                except OSError as exc:
                    self._error = exc
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:
            pass  # the loop is gone, and with it whoever waited

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a terminal that knows no such character
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


class Notices:
    """What is going on: a moving line on a terminal, a few plain lines elsewhere."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def show(self, text: str, done: float | None = None, total: float | None = None) -> None:
        """Put this on the moving line; nothing without a terminal."""
        if not self._is_terminal:
            return
        if self._progress is None or self._task is None:
            self._progress = _moving_line()
            self._task = self._progress.add_task(text, total=total)
            self._progress.start()
        self._progress.update(self._task, description=text, completed=done or 0, total=total)

    def clear(self) -> None:
        """Take the moving line away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def say(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            pass  # nobody reads it


def _moving_line() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def summary(completion: Completion, holder: str) -> str:
    """One line on how it went, and who held the model."""
    parts = [f"{completion.completion_tokens} tokens"]
    if completion.decode_tokens_per_s is not None:
        parts.append(f"{completion.decode_tokens_per_s:.1f} tokens/s")
    if completion.ttft_s is not None:
        parts.append(f"first after {completion.ttft_s:.2f} s")
    if completion.detail:
        parts.append(completion.detail)
    return f"{', '.join(parts)}; {holder}"


def describe_worker(address: str, facts: WorkerFacts) -> dict[str, Any]:
    """A worker for --json."""
    return {
        "address": address,
        "host": facts.host,
        "section": facts.section,
        "num_sections": facts.num_sections,
        "start_layer": facts.start_layer,
        "end_layer": facts.end_layer,
        "num_layers": facts.num_layers,
        "model": facts.model,
        "dtype": facts.dtype,
        "device": facts.device,
    }
