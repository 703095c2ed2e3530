"""What a worker shows to Prometheus, read over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proto.address import Address
from proto.errors import UsageError
from proto.keys import Keys
from tests.support.processes import ROOT, WorkerProcess
from worker.config import WorkerConfig


def read(url: str) -> dict[str, tuple[dict[str, str], float]]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    samples = [it for family in text_string_to_metric_families(text) for it in family.samples]
    return {it.name: (it.labels, it.value) for it in samples}


async def test_a_worker_shows_its_figures_while_it_loads_and_when_it_is_ready(
    checkpoint: Path,
) -> None:
    words = ("--metrics-listen", "127.0.0.1:0", "--log-format", "json", "--kv-memory", "1MiB")
    with WorkerProcess("--model", str(checkpoint), *words, wait=False) as worker:
        said = await asyncio.to_thread(worker.wait_for_stderr, '"metrics"')
        url = f"http://{json.loads(said)['address']}/metrics"
        early = await asyncio.to_thread(read, url)
        assert early["comboio_worker_ready"][1] in (0, 1)
        await asyncio.to_thread(worker.wait_until_ready)
        found = await asyncio.to_thread(read, url)
        labels, ready = found["comboio_worker_ready"]
        assert ready == 1 and "comboio_worker_loading_ratio" not in found
        assert labels == {"worker": worker.address, "layers": "0:4"}
        assert found["comboio_worker_steps_total"][1] == 0
        assert found["comboio_worker_memory_bytes"][1] > 10**7
        assert found["comboio_worker_kv_blocks"][1] == found["comboio_worker_kv_blocks_free"][1] > 0
        assert found["comboio_worker_weights_bytes"][1] > 0
        page = (ROOT / "docs" / "serving.md").read_text()
        said = set(re.findall(r"`(comboio_worker_[a-z_]*[a-z])`", page))
        assert said <= set(found) | {"comboio_worker_loading_ratio"}
        for path, method, status in (("/", "GET", 404), ("/metrics", "POST", 405)):
            request = urllib.request.Request(url.replace("/metrics", path), method=method)
            with pytest.raises(urllib.error.HTTPError) as refused:
                await asyncio.to_thread(urllib.request.urlopen, request, timeout=30)
            assert refused.value.code == status
            refused.value.close()
        assert worker.stop() == 0


def test_figures_leave_the_machine_only_when_somebody_says_so() -> None:
    here, everywhere = Address("127.0.0.1", 0), Address("0.0.0.0", 9710)
    with pytest.raises(UsageError, match=r"--metrics-listen 0\.0\.0\.0:9710 lets every machine"):
        WorkerConfig(listen=here, metrics_listen=everywhere, keys=Keys(secret=b"0123456789abcdef"))
    assert WorkerConfig(listen=here, metrics_listen=everywhere, insecure=True).metrics_listen
