"""What a batch cost and how fast it was, as one JSON object.

`Measurement` collects completions, looks at the workers' counters and at this process, and
`report` makes the object. Times are seconds of the monotonic clock, sizes bytes, shares 0 to 1.

- wall_s: from the first request handed to the pipeline to the last one finished. Loading the
  workers and the tokenizer is not in it.
- tokens_per_s: generated tokens / wall_s. prompt_tokens_per_s and total_tokens_per_s likewise;
  tokens of requests that failed on the way count in the tokens, as they were computed.
- latency_s: of one request, from when it is handed to the pipeline (it is then one of the
  batch-size ones at a time) to its last token. Requests that failed are left out.
- ttft_s: from the same start to its first token. inter_token_s: the times between two
  successive tokens of one request, all requests together.
- p50, p95: the value at that rank of the sorted ones, interpolated linearly between neighbours.
- busy_share of a worker: its torch thread's time at work / wall_s, whoever's steps they were.
- cpu_percent: CPU seconds / wall_s, 100 is one core. rss_bytes: the most of all samples (one a
  second); peak_rss_bytes: the most since the process started, as the system knows it.
- sent_bytes, received_bytes: on all links of a worker, during wall_s. checkpoint_read_bytes: what
  it read of the checkpoint when it started. disk_read_bytes: of this process during wall_s.
- gpu_memory_bytes: the most of all samples; gpu_busy: their mean. null without a GPU, and
  gpu_busy also where the GPU's library (pynvml) is not installed.
- server: what a llama-server says of itself, in the place of workers.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import psutil

from manager.generation import Completion
from proto.errors import Error, WorkerLost
from proto.messages import Status, WorkerFacts

if TYPE_CHECKING:
    from manager.text_server import TextServer

SAMPLE_EVERY_S: Final = 1.0
PACKAGES: Final = ("comboio", "torch", "transformers", "msgspec", "uvloop")
COUNTERS: Final = ("steps", "tokens", "compute_s", "cpu_s", "received_bytes", "sent_bytes")


@dataclass(slots=True)
class Requests:
    """What completed, in numbers."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def add(self, completion: Completion) -> None:
        """One request is over."""
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        if completion.error is not None:
            self.failed += 1
            return
        self.completed += 1
        self.latencies_s.append(completion.latency_s)
        if completion.ttft_s is not None:
            self.ttfts_s.append(completion.ttft_s)
        times_s = completion.token_times_s
        self.gaps_s += [later - earlier for earlier, later in pairwise(times_s)]

    def report(self, wall_s: float) -> dict[str, Any]:
        """Counts, rates and quantiles."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "completed": self.completed,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_per_s": rate(self.completion_tokens, wall_s),
            "prompt_tokens_per_s": rate(self.prompt_tokens, wall_s),
            "total_tokens_per_s": rate(total, wall_s),
            "requests_per_s": rate(self.completed, wall_s),
            "latency_s": quantiles(self.latencies_s),
            "ttft_s": quantiles(self.ttfts_s),
            "inter_token_s": quantiles(self.gaps_s),
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """What this process has used until now."""

    cpu_s: float
    rss_bytes: int
    peak_rss_bytes: int
    disk_read_bytes: int | None  # None where the system does not count it

    @classmethod
    def now(cls) -> Usage:
        """Ask the operating system."""
        process = psutil.Process()
        times = process.cpu_times()
        rss_bytes = int(process.memory_info().rss)
        return cls(
            times.user + times.system, rss_bytes, _peak_rss_bytes(rss_bytes), _disk_reads(process)
        )


class Measurement:
    """Of one batch, between `start` and `stop`; samples the workers meanwhile."""

    def __init__(self, server: TextServer) -> None:
        self.requests: Final = Requests()
        self._server = server
        self._workers: dict[str, WorkerHistory] = {}  # by address; some may go, others come
        self._usage: dict[str, Any] = {}  # of the server, beside its workers'
        self._usages: list[Usage] = []  # the first and the last
        self._rss_bytes = 0
        self._started_s = self._stopped_s = 0.0
        self._sampling: asyncio.Task[None] | None = None

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started_s

    async def start(self) -> None:
        """The first request follows."""
        await self._sample()
        self._started_s = time.monotonic()
        self._sampling = asyncio.ensure_future(self._keep_sampling())

    async def stop(self) -> None:
        """The last request is over."""
        self._stopped_s = time.monotonic()
        await self.close()
        try:
            await self._sample()
        except WorkerLost:
            pass  # after its work was done: what it said before counts
        self._usage = await self._server.usage()

    async def close(self) -> None:
        """Sample no more. Twice does no harm."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)

    def report(self) -> dict[str, Any]:
        """The numbers, after `stop`."""
        wall_s = self._stopped_s - self._started_s
        return {
            "wall_s": wall_s,
            **self.requests.report(wall_s),
            "model": self._server.model_name,
            "workers": [
                {**_identity(address, history.facts), **history.report(wall_s)}
                for address, history in self._workers.items()
            ],
            **self._usage,
            "manager": self._manager(wall_s),
            "versions": versions(),
        }

    async def _keep_sampling(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_EVERY_S)
            try:
                await self._sample()
            except Error:
                pass  # a worker is gone: it comes back, or the requests say so

    async def _sample(self) -> None:
        addresses = self._server.addresses
        for address, (facts, status, rtt_s) in zip(
            addresses, await self._server.status(), strict=True
        ):
            history = self._workers.setdefault(address, WorkerHistory())
            history.add(facts, status, rtt_s)
        usage = Usage.now()
        self._usages[1:] = [usage]
        self._rss_bytes = max(self._rss_bytes, usage.rss_bytes)

    def _manager(self, wall_s: float) -> dict[str, Any]:
        first, last = self._usages[0], self._usages[-1]
        reads = (
            None
            if first.disk_read_bytes is None or last.disk_read_bytes is None
            else last.disk_read_bytes - first.disk_read_bytes
        )
        return {
            "host": platform.node(),
            "cpu_percent": percent(last.cpu_s - first.cpu_s, wall_s),
            "rss_bytes": self._rss_bytes,
            "peak_rss_bytes": last.peak_rss_bytes,
            "disk_read_bytes": reads,
        }


class WorkerHistory:
    """What one worker said of itself, from the first status to the last.

    One that was started again counts from 0: what its predecessor had done is kept beside it.
    """

    facts: WorkerFacts

    def __init__(self) -> None:
        self._before = dict.fromkeys(COUNTERS, 0.0)  # of processes that are no more
        self._first: Status | None = None
        self._last: Status | None = None
        self._rtt_s: float | None = None
        self._rss_bytes = 0
        self._gpu_memory_bytes: int | None = None
        self._gpu_busy_sum, self._num_gpu_busy = 0.0, 0

    def add(self, facts: WorkerFacts, status: Status, rtt_s: float | None) -> None:
        """The next one."""
        if self._last is not None and facts.pid != self.facts.pid:
            self._before = {name: self._counted(name) for name in COUNTERS}
            self._first = None
        self.facts = facts
        self._first = self._first or status
        self._last, self._rtt_s = status, rtt_s
        self._rss_bytes = max(self._rss_bytes, status.rss_bytes)
        if status.gpu_memory_bytes is not None:
            self._gpu_memory_bytes = max(self._gpu_memory_bytes or 0, status.gpu_memory_bytes)
        if status.gpu_busy is not None:
            self._gpu_busy_sum += status.gpu_busy
            self._num_gpu_busy += 1

    def report(self, wall_s: float) -> dict[str, Any]:
        """Differences, rates and extremes."""
        last = self._last
        assert last is not None
        compute_s = self._counted("compute_s")
        return {
            "rtt_s": self._rtt_s,
            "steps": int(self._counted("steps")),
            "tokens": int(self._counted("tokens")),
            "compute_s": compute_s,
            "busy_share": rate(compute_s, wall_s),
            "cpu_percent": percent(self._counted("cpu_s"), wall_s),
            "rss_bytes": self._rss_bytes,
            "peak_rss_bytes": last.peak_rss_bytes,
            "checkpoint_read_bytes": last.read_bytes,
            "received_bytes": int(self._counted("received_bytes")),
            "sent_bytes": int(self._counted("sent_bytes")),
            "gpu_memory_bytes": self._gpu_memory_bytes,
            "gpu_busy": self._gpu_busy_sum / self._num_gpu_busy if self._num_gpu_busy else None,
        }

    def _counted(self, name: str) -> float:
        """How much a counter has grown, over all processes."""
        assert self._first is not None and self._last is not None
        grown: float = getattr(self._last, name) - getattr(self._first, name)
        return self._before[name] + grown


def summary(report: Mapping[str, Any]) -> str:
    """The most important numbers, for people."""
    busy = [worker["busy_share"] for worker in report["workers"]]
    parts = [
        f"{report['completed'] + report['failed']} requests, "
        f"{report['completion_tokens']} tokens in {report['wall_s']:.1f} s",
        f"{report['tokens_per_s'] or 0:.1f} tokens/s",
        _seconds("latency", report["latency_s"]),
        _seconds("first token", report["ttft_s"]),
        _seconds("between tokens", report["inter_token_s"]),
        "workers busy " + ", ".join(f"{100 * (share or 0):.0f} %" for share in busy)
        if busy
        else "",
    ]
    return "; ".join(part for part in parts if part)


def _seconds(name: str, values: Mapping[str, float | None]) -> str:
    p50, p95 = values["p50"], values["p95"]
    return "" if p50 is None or p95 is None else f"{name} {p50:.3f} s (p95 {p95:.3f})"


def quantiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, mean and max; all None without a value."""
    mean = sum(values) / len(values) if values else None
    return {
        "p50": quantile(values, 0.50),
        "p95": quantile(values, 0.95),
        "mean": mean,
        "max": max(values, default=None),
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value at rank `share` * (count - 1) of the sorted ones, between neighbours linearly."""
    if not values:
        return None
    ordered = sorted(values)
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def rate(amount: float, wall_s: float) -> float | None:
    """A second's part; None where no time passed."""
    return amount / wall_s if wall_s > 0 else None


def percent(seconds: float, wall_s: float) -> float | None:
    """Of one core."""
    return 100 * seconds / wall_s if wall_s > 0 else None


def versions() -> dict[str, str]:
    """Of what computes, without importing it."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def _identity(address: str, facts: WorkerFacts) -> dict[str, Any]:
    return {
        "address": address,
        "host": facts.host,
        "layers": f"{facts.start_layer}:{facts.end_layer}",
        "device": facts.device,
        "dtype": facts.dtype,
        "stage_bytes": facts.stage_bytes,
    }


def _disk_reads(process: psutil.Process) -> int | None:
    counters: Callable[[], Any] | None = getattr(process, "io_counters", None)
    if counters is None:  # not on macOS
        return None
    try:
        return int(counters().read_bytes)
    except (psutil.Error, OSError):  # some containers hide it
        return None


def _peak_rss_bytes(rss_bytes: int) -> int:
    if os.name != "posix":
        return rss_bytes
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
