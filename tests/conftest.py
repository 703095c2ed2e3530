"""What holds for every test: no network, few threads, one hypothesis profile, nothing left behind.

Runs before any test module imports torch, so that the limits below reach it, and the
processes that tests start inherit them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import HealthCheck, settings

from proto.quick_start import quick_start
from tests.support.llama_cpp import why_no_llama_cpp
from tests.support.side_by_side import share_tests

# Several processes with torch share the cores of one machine: one thread each, or they spend
# their time waiting for one another. The hub is never asked: tests make their own checkpoints.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    # Jobs on a cluster set two threads all the same. A thread that waits for a core must not burn
    # another meanwhile: a step that takes milliseconds would take seconds.
    OMP_WAIT_POLICY="passive",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    VECLIB_MAXIMUM_THREADS="1",
)
quick_start()
# The settings of whoever runs the tests are not the settings under test.
for name in [name for name in os.environ if name.startswith("COMBOIO_")]:
    del os.environ[name]

# Wall-clock deadlines fail on a busy machine and say nothing about the code. In CI a run is
# repeatable; at a desk each run tries new examples.
settings.register_profile(
    "comboio",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("comboio")


def pytest_configure(config: pytest.Config) -> None:
    share_tests(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine has no hardware or cluster for."""
    lacking = {"gpu": _why_no_gpu, "slurm": _why_no_slurm, "llama_cpp": why_no_llama_cpp}
    for mark, why_not in lacking.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := why_not()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU; torch sees none"


def _why_no_slurm() -> str | None:
    from tests.support.slurm_cluster import why_no_slurm

    return why_no_slurm()


@pytest.fixture(scope="session", autouse=True)
def _no_worker_outlives_the_tests() -> Iterator[None]:
    """Every worker or manager that a test started is gone at the end, or the run fails."""
    yield
    ours = [child for child in psutil.Process().children(recursive=True) if _is_ours(child)]
    _, alive = psutil.wait_procs(ours, timeout=10)
    left = [f"{child.pid}: {' '.join(child.cmdline())}" for child in alive if child.is_running()]
    for child in alive:
        child.kill()
    assert not left, "processes that tests left behind:\n" + "\n".join(left)


OURS = {"worker", "manager", "llama-server", "rpc-server", "ggml-rpc-server"}
OURS |= {"engine.jobs.sft_process", "manager.finetune.ranks_process"}


def _is_ours(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return any(os.path.basename(word) in OURS for word in words[:4])
