"""One child process, supervised: started so that it cannot outlive us, heard, watched, ended.

Knows processes and their lines; nothing of llama.cpp. Linux ends the child should this process die
without doing so.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final

from manager.worker_process import launch
from proto.errors import Error, UsageError

KEPT_LINES: Final = 40  # the last ones that a process said
MAX_LINE_BYTES: Final = 16 * 1024  # what is longer goes on as a line of its own
READ_BYTES: Final = 64 * 1024

# What ends a process that is asked nicely, and one that is not: signal, seconds until the next.
# llama-server answers a first SIGTERM only when its client has gone, a second one at once.
STOP: Final = ((signal.SIGTERM, 1.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))

LineSink = Callable[[str, str], None]  # name of the process, line


class LogFile:
    """A file that several processes' lines go to, each with its name before it."""

    def __init__(self, path: Path | None) -> None:
        """Open it anew; without a path the lines go nowhere.

        Raises:
            UsageError: it cannot be written.
        """
        self.path = path
        self._file: IO[str] | None = None
        if path is None:
            return
        try:
            self._file = path.open("w", encoding="utf-8", errors="replace", buffering=1)
        except OSError as exc:
            raise UsageError(f"output_log {path} cannot be written: {exc.strerror}.") from exc

    def __enter__(self) -> LogFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass  # a full disk does not end what else went well
            self._file = None

    def write(self, name: str, line: str) -> None:
        """Add a line. A disk that is full loses it, and nothing else."""
        if self._file is not None:
            try:
                self._file.write(f"{name}: {line}\n")
            except OSError:
                pass


class ChildProcess:
    """One process. `start` it, `wait` for its end or `stop` it; its lines are read meanwhile."""

    def __init__(
        self, name: str, words: Sequence[str], environ: Mapping[str, str], on_line: LineSink
    ) -> None:
        self.name: Final = name  # for sentences: "rpc-server 1"
        self.lines: Final[deque[str]] = deque(maxlen=KEPT_LINES)
        self._words, self._environ, self._on_line = list(words), dict(environ), on_line
        self._process: asyncio.subprocess.Process | None = None
        self._end: asyncio.Future[int] | None = None

    @property
    def pid(self) -> int:
        """Of the process, once it was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """As Python has it, negative for a signal; None while it runs."""
        return self._end.result() if self._end is not None and self._end.done() else None

    async def start(self) -> None:
        """Start it.

        Raises:
            Error: the machine cannot start any process.
        """
        assert self._process is None, "a ChildProcess is started once"
        try:
            self._process = await asyncio.create_subprocess_exec(
                *launch(self._words),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,  # one stream, so that lines keep their order
                limit=READ_BYTES,
                env=self._environ,
                start_new_session=True,  # a Ctrl-C at the terminal is for us
            )
        except OSError as exc:
            raise Error(f"{self.name} cannot be started: {exc.strerror}") from exc
        self._end = asyncio.ensure_future(self._read_until_end())

    async def wait(self) -> int:
        """Its exit code, when it has ended and all that it said was read."""
        assert self._end is not None, "start it first"
        return await asyncio.shield(self._end)

    async def stop(self) -> None:
        """End it, more and more firmly; a cancellation does not interrupt that."""
        if self._end is None:
            return
        stopping = asyncio.ensure_future(self._stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping
            raise

    @property
    def last_line(self) -> str:
        """The last thing it said that has words; "" before any."""
        return next((line for line in reversed(self.lines) if line.strip()), "").strip()

    async def _stop(self) -> None:
        assert self._end is not None
        for number, patience_s in STOP:
            if self._end.done():
                break
            self._signal(number)
            self._signal(signal.SIGCONT)  # one that was stopped would not hear it
            await asyncio.wait([self._end], timeout=patience_s)
        # A process of its own (a debugger, a helper) may hold the pipe open: the group goes too.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        await self._end

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            pass

    async def _read_until_end(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        reading = asyncio.ensure_future(self._read(self._process.stdout))
        try:
            code = await self._process.wait()
            # What is in the pipe is read; a grandchild that holds it open is not waited for.
            await asyncio.wait([reading], timeout=1.0)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        return code

    async def _read(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while piece := await stream.read(READ_BYTES):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                self._heard(line)
            if len(rest) > MAX_LINE_BYTES:
                self._heard(rest)
                rest = b""
        if rest:
            self._heard(rest)

    def _heard(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace").rstrip()
        self.lines.append(line)
        self._on_line(self.name, line)
