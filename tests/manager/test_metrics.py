"""Metrics: what each number means."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from manager.generation import Completion
from manager.metrics import Requests, Usage, WorkerHistory, quantile, summary, versions
from proto.messages import Status
from tests.manager.test_topology import FACTS


def completion(times_s, *, prompt_tokens=3, error=None):
    return Completion(
        text="",
        token_ids=(0,) * len(times_s),
        finish_reason="error" if error else "length",
        prompt_tokens=prompt_tokens,
        completion_tokens=len(times_s),
        ttft_s=times_s[0] if times_s else None,
        decode_tokens_per_s=None,
        latency_s=times_s[-1] if times_s else 0.5,
        error=error,
        token_times_s=tuple(times_s),
    )


def status(**changes):
    values = {
        "clock_s": 0.0,
        "steps": 0,
        "tokens": 0,
        "compute_s": 0.0,
        "step_s": None,
        "cpu_s": 0.0,
        "rss_bytes": 1,
        "peak_rss_bytes": 1,
        "read_bytes": 7,
        "received_bytes": 0,
        "sent_bytes": 0,
        "total_blocks": 1,
        "free_blocks": 1,
        "leases": 1,
    }
    return Status(**{**values, **changes})


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_lies_between_its_neighbours_in_proportion(values, share):
    assert quantile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-6)


def test_no_value_has_no_quantile():
    assert quantile([], 0.5) is None


def test_rates_count_tokens_over_the_wall_time():
    requests = Requests()
    requests.add(completion([0.1, 0.2, 0.4], prompt_tokens=10))
    requests.add(completion([0.3], prompt_tokens=2))
    report = requests.report(wall_s=2.0)
    assert report["completed"] == 2
    assert report["tokens_per_s"] == 4 / 2
    assert report["prompt_tokens_per_s"] == 12 / 2
    assert report["total_tokens_per_s"] == 16 / 2
    assert report["requests_per_s"] == 1
    assert report["latency_s"]["p50"] == pytest.approx(0.35)
    assert report["ttft_s"]["max"] == 0.3
    assert report["inter_token_s"]["mean"] == pytest.approx(0.15)


def test_a_failed_request_counts_with_its_tokens_and_without_its_times():
    requests = Requests()
    requests.add(completion([9.0, 99.0], error="NaN"))
    report = requests.report(wall_s=1.0)
    assert (report["failed"], report["completed"]) == (1, 0)
    assert report["completion_tokens"] == 2
    assert report["latency_s"] == {"p50": None, "p95": None, "mean": None, "max": None}
    assert report["inter_token_s"]["p50"] is None


def test_a_worker_s_counters_are_differences_and_its_memory_the_most():
    history = WorkerHistory()
    history.add(FACTS, status(steps=10, tokens=20, compute_s=5.0, cpu_s=6.0, sent_bytes=100), None)
    history.add(FACTS, status(rss_bytes=50, gpu_memory_bytes=9, gpu_busy=0.2), None)
    last = status(
        steps=14,
        tokens=28,
        compute_s=6.5,
        cpu_s=9.0,
        rss_bytes=40,
        peak_rss_bytes=60,
        received_bytes=30,
        sent_bytes=150,
        gpu_memory_bytes=8,
        gpu_busy=0.6,
    )
    history.add(FACTS, last, 0.002)
    assert history.report(wall_s=2.0) == {
        "rtt_s": 0.002,
        "steps": 4,
        "tokens": 8,
        "compute_s": 1.5,
        "busy_share": 0.75,
        "cpu_percent": 150.0,
        "rss_bytes": 50,
        "peak_rss_bytes": 60,
        "checkpoint_read_bytes": 7,
        "received_bytes": 30,
        "sent_bytes": 50,
        "gpu_memory_bytes": 9,
        "gpu_busy": pytest.approx(0.4),
    }


def test_a_worker_that_was_started_again_goes_on_counting():
    history = WorkerHistory()
    history.add(FACTS, status(steps=10, sent_bytes=100), None)
    history.add(FACTS, status(steps=14, sent_bytes=150), None)
    again = replace(FACTS, pid=FACTS.pid + 1)
    history.add(again, status(steps=2, sent_bytes=10), None)
    history.add(again, status(steps=5, sent_bytes=30), None)
    report = history.report(wall_s=1.0)
    assert (report["steps"], report["sent_bytes"]) == (4 + 3, 50 + 20)


def test_no_gpu_is_null_and_not_zero():
    history = WorkerHistory()
    history.add(FACTS, status(), None)
    report = history.report(wall_s=1.0)
    assert (report["gpu_memory_bytes"], report["gpu_busy"], report["rtt_s"]) == (None, None, None)


def test_no_time_has_no_rate_and_still_a_summary():
    history = WorkerHistory()
    history.add(FACTS, status(), None)
    report = {"wall_s": 0.0, **Requests().report(0.0), "workers": [history.report(0.0)]}
    assert report["tokens_per_s"] is None
    assert summary(report).startswith("0 requests, 0 tokens in 0.0 s; 0.0 tokens/s")
    json.dumps(report, allow_nan=False)


def test_this_process_says_what_it_uses():
    usage = Usage.now()
    assert usage.cpu_s > 0
    assert 0 < usage.rss_bytes <= usage.peak_rss_bytes * 2
    if sys.platform == "linux":
        assert usage.disk_read_bytes is None or usage.disk_read_bytes >= 0


def test_versions_name_what_computes():
    assert {"python", "platform", "torch", "transformers"} <= versions().keys()
