"""Start workers on this machine for one call, and always end them.

Each is a process of its own, on a free loopback port, with its share of the cores. One that dies is
started again at the same port, so that whoever lost it finds it there. Only the processes started
here are ever signalled. Knows the worker's command line, nothing of its code.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from manager.worker_process import WorkerProcess, end_all, with_this_installation
from proto.address import Address
from proto.cores import cores_each
from proto.errors import Error, UsageError
from proto.settings import FILE_VARIABLE, NO_FILE
from proto.tls import TlsFiles

MAX_SPAWNED: Final = 64
# Settings of workers that say where things are on this machine, whoever starts them.
OF_THE_MACHINE: Final = {"COMBOIO_CACHE_DIR", "COMBOIO_CACHE_SIZE", "COMBOIO_NO_CACHE"}

# A worker that dies so often, each time sooner than that after it was ready, will die again.
MAX_EARLY_DEATHS: Final = 3
EARLY_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnConfig:
    """Which workers to start."""

    count: int
    model: str | None = None
    dtype: str = "auto"
    quantize: str = "none"
    kv_quantize: str = "none"
    kv_memory: str | None = None
    secret_file: Path | None = None
    tls: TlsFiles | None = None
    adapters: tuple[tuple[str, str], ...] = ()  # (name, folder)
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
        self,
        config: SpawnConfig,
        on_progress: Callable[[SpawnProgress], None] | None = None,
        on_notice: Callable[[str], None] | None = None,
    ) -> None:
        """Start them when the block begins.

        Args:
            on_progress: told how far they are.
            on_notice: told of each that died and is started again.
        """
        self._config = config
        self._on_notice = on_notice or (lambda _: None)
        self._watching: list[asyncio.Task[None]] = []
        self._on_progress = on_progress or (lambda _: None)
        self._workers: list[WorkerProcess] = []
        self._num_ready = 0

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where they listen, first section first."""
        return tuple(worker.address for worker in self._workers if worker.address is not None)

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes started here."""
        return tuple(worker.process.pid for worker in self._workers)

    async def __aenter__(self) -> SpawnedWorkers:
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
        self._watching = [
            asyncio.ensure_future(self._watch(index)) for index in range(self._config.count)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _watch(self, index: int) -> None:
        """Start a worker again whenever it dies, unless it does so all the time."""
        early_deaths = 0
        while early_deaths < MAX_EARLY_DEATHS:
            worker, began_s = self._workers[index], time.monotonic()
            died = await worker.ended()
            assert worker.address is not None, "it was ready"
            self._on_notice(f"{str(died).rstrip('.')}; it is started again")
            early_deaths = early_deaths + 1 if time.monotonic() < began_s + EARLY_S else 0
            while early_deaths < MAX_EARLY_DEATHS:
                again = self._workers[index] = await self._start(index, worker.address.port)
                try:
                    await again.ready()
                    break
                except Error as exc:
                    self._on_notice(f"spawned worker {index} could not be started again: {exc}")
                    early_deaths += 1
        self._on_notice(f"spawned worker {index} died too often and is not started again")

    async def _start(self, index: int, port: int = 0) -> WorkerProcess:
        return await WorkerProcess.start(
            f"spawned worker {index}",
            words_of(self._config, index, port),
            environment(os.environ),
            on_loading=lambda loading, percent: self._report(index, loading, percent),
        )

    def _report(self, index: int, loading: str, percent: int) -> None:
        count = self._config.count
        self._on_progress(SpawnProgress(index, loading, percent, self._num_ready, count))

    async def _ready(self, index: int) -> None:
        await self._workers[index].ready()
        self._num_ready += 1
        self._report(index, "", 100)

    async def _all_ready(self) -> None:
        """Wait for every ready line; the first worker that fails speaks for all."""
        waits = [asyncio.ensure_future(self._ready(index)) for index in range(len(self._workers))]
        try:
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _end(self) -> None:
        for watching in self._watching:
            watching.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await end_all(self._workers)


def words_of(config: SpawnConfig, index: int, port: int = 0) -> list[str]:
    """The options of worker `index`; port 0 picks a free one."""
    words = ["--sections", str(config.count), "--index", str(index)]
    words += ["--listen", f"127.0.0.1:{port}", "--log-format", "json", "--dtype", config.dtype]
    words += ["--threads", str(config.threads or cores_each(config.count))]
    if config.model is not None:
        words += ["--model", config.model]
    if config.kv_memory is not None:
        words += ["--kv-memory", config.kv_memory]
    if config.quantize != "none":
        words += ["--quantize", config.quantize]
    if config.kv_quantize != "none":
        words += ["--kv-quantize", config.kv_quantize]
    for name, folder in config.adapters:
        words += ["--adapter", f"{name}={folder}"]
    if config.secret_file is not None:
        words += ["--secret-file", str(config.secret_file)]
    if config.tls is not None:
        files = config.tls
        words += ["--tls-cert", str(files.cert), "--tls-key", str(files.key)]
        words += ["--tls-ca", str(files.ca)]
    return words


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The manager's own environment, without what sets up workers that people start."""
    kept = {
        key: value
        for key, value in environ.items()
        if not key.startswith("COMBOIO_") or key in OF_THE_MACHINE
    }
    return with_this_installation(kept) | {FILE_VARIABLE: NO_FILE}
