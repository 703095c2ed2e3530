"""One worker as a child of this process: started, waited for, listened to, and always ended.

Knows the worker's command line, its `ready` line and its log, nothing of its code. Only the
processes started here are ever signalled.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from proto.address import Address, parse_address
from proto.errors import Error, UsageError

STOP_DEADLINE_S: Final = 5.0  # after SIGTERM; then SIGKILL
KEPT_LINES: Final = 20  # of a worker's stderr, to say why it failed
MAX_LINE_BYTES: Final = 64 * 1024

# Linux: have the kernel send SIGTERM (15) should the manager die without ending its workers, then
# become the worker. A `preexec_fn` would do it in a forked child of a process with threads.
PR_SET_PDEATHSIG: Final = 1
LAUNCHER: Final = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class WorkerProcess:
    """One process, its two output streams, and what they said.

    Args:
        name: for sentences: "spawned worker 0".
        process: from `start`, with pipes for stdout and stderr.
        on_loading: called with ("35/70 MB, 350 MB/s", percent) while it loads.
        on_line: called with every line of its log.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        *,
        on_loading: Callable[[str, int], None] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self.process = name, process
        self.address: Address | None = None
        self.ready_line: str = ""
        self._on_loading, self._on_line = on_loading, on_line
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._listening = asyncio.ensure_future(self._read_stderr())
        self._draining: asyncio.Future[None] | None = None

    @classmethod
    async def start(
        cls, name: str, words: Sequence[str], environment: Mapping[str, str], **callbacks: Any
    ) -> WorkerProcess:
        """Start `worker WORDS`; it ends with this process."""
        process = await asyncio.create_subprocess_exec(
            *launch([sys.executable, "-m", "worker", *words]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C at the terminal is for the manager
        )
        return cls(name, process, **callbacks)

    async def ready(self) -> Address:
        """Wait for the ready line.

        Raises:
            UsageError, Error: it ended instead; with its own last sentence.
        """
        assert self.process.stdout is not None
        async for raw in _lines(self.process.stdout):
            words = raw.split()
            if len(words) >= 2 and words[0] == "ready":
                self.ready_line, self.address = raw, parse_address(words[1])
                self._draining = asyncio.ensure_future(_drain(self.process.stdout))
                return self.address
        raise await self.ended()

    async def ended(self) -> Error:
        """Wait until the process ends; why, in its own last sentence if it has one."""
        code = await self.process.wait()
        await asyncio.wait([self._listening])
        sentence = next(
            (
                line[len("worker: ") :]
                for line in reversed(self._lines)
                if line.startswith("worker: ")
            ),
            None,
        )
        if sentence is None:
            ending = f"was ended by signal {-code}" if code < 0 else f"left with exit code {code}"
            when = "" if self.address is not None else " before it was ready"
            said = f"; the last it said: {self._lines[-1]}" if self._lines else ""
            return Error(f"{self.name} {ending}{when}{said}")
        kind = UsageError if code == UsageError.exit_code else Error
        return kind(sentence)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.process.returncode is None:
            try:
                self.process.send_signal(number)
            except ProcessLookupError:
                pass

    async def finish(self) -> None:
        """Wait until the process has ended: its streams end as well."""
        await self.process.wait()
        waits = [self._listening, *([self._draining] if self._draining else [])]
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for line in _lines(self.process.stderr):
            self._lines.append(line)
            if self._on_line is not None:
                self._on_line(line)
            loading = _loading(line)
            if loading is not None and self._on_loading is not None and self.address is None:
                self._on_loading(*loading)


async def end_all(workers: Sequence[WorkerProcess]) -> None:
    """SIGTERM, then SIGKILL; not interrupted halfway by a cancellation."""
    ending = asyncio.ensure_future(_end_all(workers))
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await ending
        raise


def launch(words: Sequence[str]) -> list[str]:
    """The command line that does not outlive this process."""
    if sys.platform != "linux":
        return list(words)
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *words]


def with_this_installation(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which `python -m worker` is this installation's, wherever it is called."""
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environ, "PYTHONPATH": os.pathsep.join(paths)}


async def _end_all(workers: Sequence[WorkerProcess]) -> None:
    for worker in workers:
        worker.signal(signal.SIGTERM)
    waits = [asyncio.ensure_future(worker.finish()) for worker in workers]
    if not waits:
        return
    _, late = await asyncio.wait(waits, timeout=STOP_DEADLINE_S)
    if late:
        for worker in workers:
            worker.signal(signal.SIGKILL)
        await asyncio.wait(late)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Decoded lines; one longer than the limit is dropped, not fatal."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip()


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(MAX_LINE_BYTES):
        pass


def _loading(line: str) -> tuple[str, int] | None:
    """What a log line says of the loading; None for any other line."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("event") not in ("staging", "loading"):
        return None
    percent = said.get("percent")
    words = f"{said.get('mb', '?')} MB, {said.get('mb_per_s', '?')} MB/s"
    return (words, percent) if isinstance(percent, int) else None
