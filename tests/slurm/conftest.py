"""Real Slurm clusters, each booted once for all tests that ask for it.

Tests leave a cluster as they found it: jobs ended, nodes up (`SlurmCluster.mend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manager.slurm.records import Records
from tests.support.slurm_cluster import SlurmCluster, boot_cluster, why_no_accounting


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Three nodes without accounting, as on a small cluster."""
    with boot_cluster(3) as cluster:
        yield cluster


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """An empty file of records."""
    return Records(tmp_path / "records.jsonl")


@pytest.fixture
def forgetful(tmp_path: Path) -> Callable[[SlurmCluster], dict[str, str]]:
    """For `env` of a command: a squeue as it is minutes after the last job has ended.

    Slurm itself forgets a job after MinJobAge, and looks for such jobs once a minute.
    """
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *--jobs*)\n'
        "  echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1;;\nesac\n"
    )
    squeue.chmod(0o755)
    return lambda cluster: {"PATH": f"{squeue.parent}:{cluster.env['PATH']}"}


@pytest.fixture(scope="session")
def slurm_with_accounting() -> Iterator[SlurmCluster]:
    """Two nodes whose ended jobs `sacct` knows."""
    if reason := why_no_accounting():
        pytest.skip(reason)
    with boot_cluster(2, "-A") as cluster:
        yield cluster
