"""Open what runs the model, for a command line: call a llama-server, or open a pipeline, for which
workers are spawned if asked. Shows progress, traces if asked.

The one place where a `ConnectionConfig` becomes a `TextServer`.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from engine import lean_imports
from manager.adapter_book import spawned_adapters
from manager.event_log import EventLog
from manager.event_loop import in_background
from manager.options import LLAMA_SERVER, ConnectionConfig
from manager.output import Notices
from manager.spawn import SpawnConfig, SpawnedWorkers, SpawnProgress
from proto.errors import UsageError

if TYPE_CHECKING:
    from manager.dispatcher import Trace
    from manager.keeper import OnChain
    from manager.pipeline import Pipeline, TokensHint
    from manager.recovery import RecoverySettings
    from manager.text_server import TextServer


@asynccontextmanager
async def open_server(
    config: ConnectionConfig,
    notices: Notices,
    *,
    max_sequences: int,
    max_tokens_hint: TokensHint | None,
    adapters: Collection[str] = (),
) -> AsyncIterator[TextServer]:
    """Whatever runs the model, for the block.

    Args:
        max_sequences, max_tokens_hint: what a pipeline asks room for.
        adapters: that requests are going to name: names, folders, or NAME=DIR.
    Raises:
        Error: there is nothing that runs it, or no such adapter; in one sentence.
    """
    if config.backend == LLAMA_SERVER:
        for adapter in adapters:
            raise UsageError(
                f"--adapter {adapter} means nothing to a llama-server, which was started with "
                "its adapters: leave it out, or run the model on workers."
            )
        async with _open_llama_server(config, notices) as server:
            yield server
        return
    async with open_pipeline(
        config,
        notices,
        max_sequences=max_sequences,
        max_tokens_hint=max_tokens_hint,
        adapters=adapters,
    ) as pipeline:
        yield pipeline


@asynccontextmanager
async def _open_llama_server(
    config: ConnectionConfig, notices: Notices
) -> AsyncIterator[TextServer]:
    from manager.llama_server.api_key import find_api_key
    from manager.llama_server.remote import RemotePipeline

    assert config.server is not None
    server = await RemotePipeline.open(
        config.server,
        api_key=find_api_key(config.server, config.api_key_file, os.environ),
        model=config.model,
        on_progress=notices.show,
        on_notice=notices.say,
    )
    async with server:
        notices.clear()
        yield server


@asynccontextmanager
async def open_pipeline(
    config: ConnectionConfig,
    notices: Notices,
    *,
    max_sequences: int,
    max_tokens_hint: TokensHint | None,
    adapters: Collection[str] = (),
    trace: Trace | None = None,
    on_chain: OnChain = lambda _: None,
) -> AsyncIterator[Pipeline]:
    """A pipeline for the block; then leases are given back and spawned workers ended.

    Args:
        trace: told when each step was where, instead of the file that `config` names.
        on_chain: told of each loss, and None when requests go on.
    """
    lean_imports.allow()
    recovery = _recovery(config)
    async with _workers(config, notices, adapters) as workers:
        from manager.pipeline import Pipeline

        trace, event_log = trace or _open_trace(config), None
        try:
            if config.event_log is not None:
                event_log = EventLog(config.event_log)
            pipeline = await Pipeline.open(
                workers,
                model=config.model,
                secret_file=config.secret_file,
                tls=config.tls,
                max_sequences=max_sequences,
                max_tokens_hint=max_tokens_hint,
                recovery=recovery,
                trace=trace,
                event_log=event_log,
                on_progress=notices.show,
                on_notice=notices.say,
                on_chain=on_chain,
            )
        except BaseException:
            for opened in (trace, event_log):
                if opened is not None:
                    opened.close()
            raise
        async with pipeline:
            if adapters:
                notices.show("looking for the adapters")
                await pipeline.provide_adapters(adapters)
            notices.clear()
            yield pipeline


def _recovery(config: ConnectionConfig) -> RecoverySettings:
    """How long to wait for what after a loss.

    Raises:
        UsageError: for a time that is none.
    """
    from manager.recovery import TAKEOVER_AFTER_S, RecoverySettings

    after_s = config.takeover_after
    if after_s is None:  # a worker that died under --spawn is being started again
        after_s = math.inf if config.spawn is not None else TAKEOVER_AFTER_S
    return RecoverySettings(
        timeout_s=config.recovery_timeout,
        resplit_after_s=None if after_s == math.inf else after_s,
    )


@asynccontextmanager
async def _workers(
    config: ConnectionConfig, notices: Notices, adapters: Collection[str]
) -> AsyncIterator[str | list[str] | None]:
    if config.spawn is None:
        yield config.workers
        return
    spawn = SpawnConfig(
        count=config.spawn,
        model=config.model,
        quantize=config.quantize,
        kv_quantize=config.kv_quantize,
        secret_file=config.secret_file,
        tls=config.tls,
        adapters=spawned_adapters(adapters),
    )
    started_s = time.monotonic()
    notices.show(f"starting {spawn.count} workers")
    # What the manager needs of torch loads meanwhile, in a thread.
    imported = asyncio.ensure_future(in_background(import_module, "engine.entry"))
    try:
        async with SpawnedWorkers(spawn, lambda it: _show(notices, it), notices.say) as workers:
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
