"""Open a pipeline for a command line: spawn workers if asked, show progress, trace if asked.

The one place where a `ConnectionConfig` becomes a `Pipeline`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from manager.event_loop import in_background
from manager.options import ConnectionConfig
from manager.output import Notices
from manager.spawn import SpawnConfig, SpawnedWorkers, SpawnProgress

if TYPE_CHECKING:
    from manager.dispatcher import Trace
    from manager.pipeline import Pipeline, TokensHint


@asynccontextmanager
async def open_pipeline(
    config: ConnectionConfig,
    notices: Notices,
    *,
    max_sequences: int,
    max_tokens_hint: TokensHint | None,
) -> AsyncIterator[Pipeline]:
    """A pipeline for the block; then leases are given back and spawned workers ended."""
    async with _workers(config, notices) as workers:
        from manager.pipeline import Pipeline

        trace = _open_trace(config)
        try:
            pipeline = await Pipeline.open(
                workers,
                model=config.model,
                secret_file=config.secret_file,
                max_sequences=max_sequences,
                max_tokens_hint=max_tokens_hint,
                trace=trace,
                on_progress=notices.show,
            )
        except BaseException:
            if trace is not None:
                trace.close()
            raise
        async with pipeline:
            notices.clear()
            yield pipeline


@asynccontextmanager
async def _workers(
    config: ConnectionConfig, notices: Notices
) -> AsyncIterator[str | list[str] | None]:
    if config.spawn is None:
        yield config.workers
        return
    spawn = SpawnConfig(count=config.spawn, model=config.model, secret_file=config.secret_file)
    started_s = time.monotonic()
    notices.show(f"starting {spawn.count} workers")
    # What the manager needs of torch loads meanwhile, in a thread.
    imported = asyncio.ensure_future(in_background(import_module, "engine.entry"))
    try:
        async with SpawnedWorkers(spawn, lambda it: _show(notices, it)) as workers:
            seconds = time.monotonic() - started_s
            notices.say(f"{spawn.count} workers ready after {seconds:.1f} s")
            await imported
            yield [str(address) for address in workers.addresses]
    finally:
        imported.cancel()


def _show(notices: Notices, progress: SpawnProgress) -> None:
    if progress.loading:
        text = f"worker {progress.index} loads {progress.loading}"
        notices.show(text, progress.percent, 100)
    else:
        notices.show(f"{progress.num_ready} of {progress.count} workers ready")


def _open_trace(config: ConnectionConfig) -> Trace | None:
    if config.trace is None:
        return None
    from manager.trace import open_trace

    return open_trace(config.trace)
