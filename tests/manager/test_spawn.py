"""Workers that one call starts end with it, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from manager.spawn import SpawnConfig, SpawnedWorkers, environment
from proto.errors import Error, UsageError
from tests.support.processes import ROOT, clean_environment


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_number_of_workers_that_makes_no_sense_is_refused(count):
    with pytest.raises(UsageError, match=str(count)):
        SpawnConfig(count=count)


def test_settings_for_workers_that_people_start_are_kept_from_spawned_ones():
    made = environment({"COMBOIO_LISTEN": "0.0.0.0:1", "HOME": "/h"}, settings_file="/none")
    assert "COMBOIO_LISTEN" not in made
    assert made["COMBOIO_CONFIG"] == "/none"
    assert made["HOME"] == "/h"


async def test_they_are_gone_when_the_block_ends_in_an_error():
    workers = SpawnedWorkers(SpawnConfig(count=2, threads=1))

    async def fail_inside() -> None:
        async with workers:
            assert len(workers.addresses) == 2
            assert all(psutil.pid_exists(pid) for pid in workers.pids)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert not any(psutil.pid_exists(pid) for pid in workers.pids)


async def test_a_worker_that_cannot_start_says_why_and_leaves_no_other(tmp_path):
    workers = SpawnedWorkers(SpawnConfig(count=2, model=str(tmp_path), threads=1))
    with pytest.raises(UsageError, match=str(tmp_path)):
        await workers.__aenter__()
    assert not any(psutil.pid_exists(pid) for pid in workers.pids)


async def test_a_deadline_ends_them_all():
    workers = SpawnedWorkers(SpawnConfig(count=1, threads=1, ready_deadline_s=0.1))
    with pytest.raises(Error, match=r"not ready within 0\.1 seconds"):
        await workers.__aenter__()
    assert not any(psutil.pid_exists(pid) for pid in workers.pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does this")
def test_they_do_not_outlive_a_manager_that_is_killed():
    script = (
        "import asyncio\nfrom manager.spawn import SpawnConfig, SpawnedWorkers\n"
        "async def main():\n"
        "    async with SpawnedWorkers(SpawnConfig(count=1, threads=1)) as workers:\n"
        "        print(*workers.pids, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
    ) as manager:
        assert manager.stdout is not None
        worker = psutil.Process(int(manager.stdout.readline()))
        manager.send_signal(signal.SIGKILL)
    worker.wait(120)
