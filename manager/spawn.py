"""Start workers on this machine for one call, and always end them.

Each is a process of its own, on a free loopback port, with its share of the cores. Only the
processes started here are ever signalled. Knows the worker's command line and its `ready` line,
nothing of its code.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from proto.address import Address, parse_address
from proto.cores import cores_each
from proto.errors import Error, UsageError

MAX_SPAWNED: Final = 64
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnConfig:
    """Which workers to start."""

    count: int
    model: str | None = None
    dtype: str = "auto"
    kv_memory: str | None = None
    secret_file: Path | None = None
    threads: int | None = None  # of each; None: the cores divided
    ready_deadline_s: float | None = None  # None: a large checkpoint may take as long as it needs

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SPAWNED:
            raise UsageError(
                f"cannot spawn {self.count} workers: a number from 1 to {MAX_SPAWNED} is possible."
            )


@dataclass(frozen=True, slots=True)
class SpawnProgress:
    """How far the workers are, for whoever shows it."""

    index: int
    loading: str  # what a worker said last of its loading: "35/70 MB, 350 MB/s"
    percent: int  # of that
    num_ready: int
    count: int


class SpawnedWorkers:
    """`count` workers over one model; an async context manager that ends them."""

    def __init__(
        self, config: SpawnConfig, on_progress: Callable[[SpawnProgress], None] | None = None
    ) -> None:
        self._config = config
        self._on_progress = on_progress or (lambda _: None)
        self._workers: list[_Worker] = []
        self._num_ready = 0
        self._no_settings: Path | None = None  # an empty comboio.toml, for the workers

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where they listen, first section first."""
        return tuple(worker.address for worker in self._workers if worker.address is not None)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes started here."""
        return tuple(worker.process.pid for worker in self._workers)

    async def __aenter__(self) -> SpawnedWorkers:
        handle, path = tempfile.mkstemp(prefix="comboio-", suffix=".toml")
        os.close(handle)
        self._no_settings = Path(path)
        try:
            for index in range(self._config.count):
                self._workers.append(await self._start(index))
            await asyncio.wait_for(self._all_ready(), self._config.ready_deadline_s)
        except asyncio.TimeoutError:
            await self._end()
            raise Error(
                f"the {self._config.count} workers were not ready within "
                f"{self._config.ready_deadline_s:g} seconds."
            ) from None
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _start(self, index: int) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *launch(command(self._config, index)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env=environment(os.environ, settings_file=str(self._no_settings)),
            start_new_session=True,  # a Ctrl-C at the terminal is for the manager
        )
        return _Worker(index, process, self._report)

    def _report(self, index: int, loading: str, percent: int, became_ready: bool) -> None:
        self._num_ready += became_ready
        count = self._config.count
        self._on_progress(SpawnProgress(index, loading, percent, self._num_ready, count))

    async def _all_ready(self) -> None:
        """Wait for every ready line; the first worker that fails speaks for all."""
        waits = [asyncio.ensure_future(worker.ready()) for worker in self._workers]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _end(self) -> None:
        """SIGTERM, then SIGKILL; not interrupted halfway by a cancellation."""
        if self._no_settings is not None:
            self._no_settings.unlink(missing_ok=True)
        ending = asyncio.ensure_future(_end_all(self._workers))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise


def command(config: SpawnConfig, index: int) -> list[str]:
    """The command line of worker `index`."""
    words = [sys.executable, "-m", "worker"]
    words += ["--sections", str(config.count), "--index", str(index)]
    words += ["--listen", "127.0.0.1:0", "--log-format", "json", "--dtype", config.dtype]
    words += ["--threads", str(config.threads or cores_each(config.count))]
    if config.model is not None:
        words += ["--model", config.model]
    if config.kv_memory is not None:
        words += ["--kv-memory", config.kv_memory]
    if config.secret_file is not None:
        words += ["--secret-file", str(config.secret_file)]
    return words


def launch(words: Sequence[str]) -> list[str]:
    """The command line that does not outlive this process."""
    if sys.platform != "linux":
        return list(words)
    return [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *words]


def environment(environ: Mapping[str, str], settings_file: str) -> dict[str, str]:
    """The manager's own environment, without what sets up workers that people start."""
    kept = {key: value for key, value in environ.items() if not key.startswith("COMBOIO_")}
    # The worker must be the one of this installation, wherever the caller stands.
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "COMBOIO_CONFIG": settings_file}


class _Worker:
    """One process, its two output streams, and what they said."""

    def __init__(
        self,
        index: int,
        process: asyncio.subprocess.Process,
        report: Callable[[int, str, int, bool], None],
    ) -> None:
        self.index, self.process = index, process
        self.address: Address | None = None
        self._report = report
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._listening = asyncio.ensure_future(self._read_stderr())
        self._draining: asyncio.Future[None] | None = None

    async def ready(self) -> None:
        """Wait for the ready line.

        Raises:
            UsageError, Error: it ended instead; with its own last sentence.
        """
        assert self.process.stdout is not None
        async for raw in _lines(self.process.stdout):
            words = raw.split()
            if len(words) >= 2 and words[0] == "ready":
                self.address = parse_address(words[1])
                self._report(self.index, "", 100, True)
                self._draining = asyncio.ensure_future(_drain(self.process.stdout))
                return
        code = await self.process.wait()
        await self._listening
        raise self._failure(code)

    def _failure(self, code: int) -> Error:
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
            said = f"; the last it said: {self._lines[-1]}" if self._lines else ""
            return Error(f"spawned worker {self.index} {ending} before it was ready{said}")
        kind = UsageError if code == UsageError.exit_code else Error
        return kind(sentence)

    async def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        async for line in _lines(self.process.stderr):
            self._lines.append(line)
            loading = _loading(line)
            if loading is not None and self.address is None:
                self._report(self.index, *loading, False)

    async def finish(self) -> None:
        """The process has ended: its streams end as well."""
        await self.process.wait()
        waits = [self._listening, *([self._draining] if self._draining else [])]
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _end_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        _signal(worker, signal.SIGTERM)
    waits = [asyncio.ensure_future(worker.finish()) for worker in workers]
    if not waits:
        return
    _, late = await asyncio.wait(waits, timeout=STOP_DEADLINE_S)
    if late:
        for worker in workers:
            _signal(worker, signal.SIGKILL)
        await asyncio.wait(late)


def _signal(worker: _Worker, number: signal.Signals) -> None:
    if worker.process.returncode is None:
        try:
            worker.process.send_signal(number)
        except ProcessLookupError:
            pass


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
    if not isinstance(said, dict) or said.get("event") != "loading":
        return None
    percent = said.get("percent")
    words = f"{said.get('mb', '?')} MB, {said.get('mb_per_s', '?')} MB/s"
    return (words, percent) if isinstance(percent, int) else None
