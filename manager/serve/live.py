"""The live view: what the workers and the queue look like, several times a second.

One poller for all who watch, none when nobody does. Knows the pipeline's own numbers; the page and
`manager top` draw them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from manager.serve.admission import Admission
from manager.serve.keeper import Keeper, State
from proto.errors import Error
from proto.messages import Status, WorkerFacts

EVERY_S: Final = 0.25
MAX_WATCHERS: Final = 64


@dataclass(frozen=True, slots=True)
class Seen:
    """One worker at one moment."""

    address: str
    facts: WorkerFacts
    status: Status
    rtt_s: float | None


class Live:
    """Snapshots for who watches."""

    def __init__(self, keeper: Keeper, admission: Admission) -> None:
        self._keeper, self._admission = keeper, admission
        self._watchers: set[asyncio.Queue[dict[str, Any]]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._workers: list[Seen] = []
        self._before: dict[str, Seen] = {}
        self._tokens, self._at_s = 0, 0.0
        self.generated = 0  # tokens since the start; the API counts them here

    @property
    def is_full(self) -> bool:
        """Whether nobody more can watch."""
        return len(self._watchers) >= MAX_WATCHERS

    async def watch(self) -> AsyncGenerator[dict[str, Any], None]:
        """Snapshots, newest first come; a slow watcher misses some."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        self._watchers.add(queue)
        if self._poller is None:
            self._poller = asyncio.ensure_future(self._poll())
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)
            if not self._watchers and self._poller is not None:
                self._poller.cancel()
                self._poller = None

    async def snapshot(self) -> dict[str, Any]:
        """How it is now."""
        now_s = time.monotonic()
        pipeline, is_whole = self._keeper.pipeline, self._keeper.state is not State.LOST
        if pipeline is not None and pipeline.lost is None:
            try:
                seen = await pipeline.status()
                self._workers = [
                    Seen(address, *it) for address, it in zip(pipeline.addresses, seen, strict=True)
                ]
            except Error:
                is_whole = False  # the keeper says so in a moment
        stats = None if pipeline is None else pipeline.stats()
        elapsed_s = now_s - self._at_s
        rate = (self.generated - self._tokens) / elapsed_s if self._at_s else 0.0
        self._tokens, self._at_s = self.generated, now_s
        lost = getattr(self._keeper.last_loss, "worker", None) if not self._is_ready else None
        workers = [self._worker(it, is_lost=it.address == lost) for it in self._workers]
        self._before = {it.address: it for it in self._workers}
        return {
            "state": self._keeper.state.value,
            "reason": self._keeper.reason,
            "whole": is_whole,
            "losses": self._keeper.losses,
            "model": self._workers[0].facts.model if self._workers else None,
            "num_layers": self._workers[0].facts.num_layers if self._workers else None,
            "max_context": self._workers[0].facts.max_context if self._workers else None,
            "hidden_bytes": _hidden_bytes(self._workers),
            "running": self._admission.running,
            "waiting": self._admission.waiting,
            "tokens": self.generated,
            "tokens_per_s": rate,
            "epoch": stats.epoch if stats else None,
            "steps_in_flight": stats.steps_in_flight if stats else 0,
            "kv_blocks": stats.blocks_total if stats else 0,
            "kv_blocks_free": stats.blocks_free if stats else 0,
            "workers": workers,
        }

    @property
    def _is_ready(self) -> bool:
        return self._keeper.state is State.READY

    def _worker(self, seen: Seen, *, is_lost: bool) -> dict[str, Any]:
        facts, status = seen.facts, seen.status
        before = self._before.get(seen.address)
        elapsed_s = status.clock_s - before.status.clock_s if before else 0.0
        busy = steps_per_s = 0.0
        if before is not None and elapsed_s > 0 and status.steps >= before.status.steps:
            busy = min(1.0, (status.compute_s - before.status.compute_s) / elapsed_s)
            steps_per_s = (status.steps - before.status.steps) / elapsed_s
        return {
            "address": seen.address,
            "host": facts.host,
            "device": facts.device,
            "dtype": facts.dtype,
            "start_layer": facts.start_layer,
            "end_layer": facts.end_layer,
            "stage_bytes": facts.stage_bytes,
            "memory_bytes": status.rss_bytes,
            "gpu_memory_bytes": status.gpu_memory_bytes,
            "kv_total": status.total_blocks,
            "kv_free": status.free_blocks,
            "step_s": status.step_s,
            "rtt_s": seen.rtt_s,
            "busy": max(0.0, busy),
            "steps": status.steps,
            "steps_per_s": steps_per_s,
            "sent_bytes": status.sent_bytes,
            "adapters": status.adapters,
            "lost": is_lost,
        }

    async def _poll(self) -> None:
        while True:
            snapshot = await self.snapshot()
            for queue in self._watchers:
                if queue.full():
                    queue.get_nowait()
                queue.put_nowait(snapshot)
            await asyncio.sleep(EVERY_S)


def _hidden_bytes(workers: list[Seen]) -> int | None:
    """Bytes of one token's hidden state between two workers."""
    if not workers:
        return None
    facts = workers[0].facts
    return facts.hidden_size * (4 if facts.dtype == "float32" else 2)
