"""What Prometheus reads at /metrics: requests counted here, workers asked when somebody reads.

Names begin with `comboio_`, in seconds and bytes; what only grows ends in `_total`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.requests import Stats
from manager.serve.admission import Admission
from manager.serve.keeper import Keeper, State
from proto.messages import Status, WorkerFacts
from proto.worker_figures import COUNTERS, GAUGES, figures

WAITS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_TIMES: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

# A second series of each counter, which nobody asked for.
disable_created_metrics()  # type: ignore[no-untyped-call]

Seen = Sequence[tuple[WorkerFacts, Status, float | None]]


class Metrics:
    """The counters of one server."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, keeper: Keeper, admission: Admission) -> None:
        self._keeper, self._admission = keeper, admission
        self._registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "comboio_requests",
            "Requests that ended, by endpoint and HTTP status; 499: the client went away.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "comboio_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=WAITS,
            registry=self._registry,
        )
        self.ttft_seconds = Histogram(
            "comboio_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=WAITS,
            registry=self._registry,
        )
        self.token_seconds = Histogram(
            "comboio_time_per_output_token_seconds",
            "Between two tokens of a text, the mean of each request.",
            buckets=TOKEN_TIMES,
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "comboio_prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self.generated_tokens = Counter(
            "comboio_generated_tokens", "Tokens that were generated.", registry=self._registry
        )
        self._ready = Gauge("comboio_ready", "1 when requests can run.", registry=self._registry)
        self._running = Gauge(
            "comboio_requests_running", "Texts that are generated now.", registry=self._registry
        )
        self._waiting = Gauge(
            "comboio_requests_waiting", "Texts that wait for their turn.", registry=self._registry
        )
        self._workers = WorkerCollector()
        self._registry.register(self._workers)

    def exposition(self, seen: Seen, addresses: Sequence[str], stats: Stats | None) -> bytes:
        """All of it as text; `seen` and `stats` are what the workers and the scheduler say now."""
        self._ready.set(self._keeper.state is State.READY)
        self._running.set(self._admission.running)
        self._waiting.set(self._admission.waiting)
        self._workers.seen = list(zip(addresses, seen, strict=True)) if seen else []
        self._workers.stats, self._workers.losses = stats, self._keeper.losses
        return bytes(generate_latest(self._registry))


class WorkerCollector(Collector):
    """What the workers and the scheduler count."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[WorkerFacts, Status, float | None]]] = []
        self.stats: Stats | None = None
        self.losses = 0

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The families, with what is known now."""
        yield CounterMetricFamily(
            "comboio_pipeline_losses", "How often a worker was lost.", value=self.losses
        )
        stats = self.stats
        if stats is not None:
            yield GaugeMetricFamily(
                "comboio_kv_blocks", "KV blocks leased on each worker.", value=stats.blocks_total
            )
            yield GaugeMetricFamily(
                "comboio_kv_blocks_free", "Those that nobody uses now.", value=stats.blocks_free
            )
            yield GaugeMetricFamily(
                "comboio_steps_in_flight", "Steps on their way.", value=stats.steps_in_flight
            )
            yield CounterMetricFamily(
                "comboio_preemptions", "Texts that gave up their KV.", value=stats.preemptions
            )
            yield CounterMetricFamily(
                "comboio_shared_prompt_tokens",
                "Prompt tokens that needed no computing.",
                value=stats.shared_tokens,
            )
        yield from self._of_workers()

    def _of_workers(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        labels = ["worker", "layers"]
        gauges = GAUGES | {"rtt_seconds": "Round trip to the worker."}
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, text in COUNTERS.items():
            families[name] = CounterMetricFamily(f"comboio_worker_{name}", text, labels=labels)
        for name, text in gauges.items():
            families[name] = GaugeMetricFamily(f"comboio_worker_{name}", text, labels=labels)
        for address, (facts, status, rtt_s) in self.seen:
            values = figures(status) | {"rtt_seconds": rtt_s}
            where = [address, f"{facts.start_layer}:{facts.end_layer}"]
            for name, value in values.items():
                if value is not None:
                    families[name].add_metric(where, value)
        yield from families.values()
