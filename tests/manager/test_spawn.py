"""Workers that one call starts end with it, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import pairwise

import psutil
import pytest

from manager.connection import open_pipeline
from manager.generation import GenerationOptions
from manager.options import ConnectionConfig
from manager.output import Notices
from manager.spawn import SpawnConfig, SpawnedWorkers, environment
from proto.errors import Error, UsageError
from proto.settings import settings_file
from tests.support.chains import save_tiny_with_tokenizer
from tests.support.processes import ROOT, clean_environment


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_number_of_workers_that_makes_no_sense_is_refused(count):
    with pytest.raises(UsageError, match=str(count)):
        SpawnConfig(count=count)


def test_settings_for_workers_that_people_start_are_kept_from_spawned_ones():
    made = environment({"COMBOIO_LISTEN": "0.0.0.0:1", "HOME": "/h"})
    assert "COMBOIO_LISTEN" not in made
    assert settings_file(made) is None
    assert made["HOME"] == "/h"


async def test_one_that_is_killed_comes_back_and_all_are_gone_when_the_block_ends_in_an_error(
    tmp_path, capsys
):
    tiny = save_tiny_with_tokenizer(tmp_path)
    config = ConnectionConfig(spawn=2, model=str(tiny.folder), recovery_timeout=120)
    prompt, options = [5, 9, 40, 7], GenerationOptions(max_new_tokens=30, ignore_eos=True)
    spawned: list[psutil.Process] = []

    async def fail_inside() -> None:
        before = set(psutil.Process().children())
        async with open_pipeline(
            config, Notices(), max_sequences=1, max_tokens_hint=64
        ) as pipeline:
            spawned.extend(set(psutil.Process().children()) - before)
            assert len(spawned) == 2
            addresses = pipeline.addresses
            undisturbed = await pipeline.generate(prompt, options)
            pieces = []
            async for piece in pipeline.stream(prompt, options):
                pieces.append(piece)
                if len(pieces) == 10:
                    next(it for it in spawned if "1" in words_after(it, "--index")).kill()
            assert "".join(it.text for it in pieces) == undisturbed.text
            tokens = tuple(token for it in pieces for token in it.token_ids)
            assert tokens == undisturbed.token_ids
            assert pipeline.addresses == addresses
            spawned.extend(set(psutil.Process().children()) - before - set(spawned))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail_inside()
    assert len(spawned) == 3
    assert not any(it.is_running() for it in spawned)
    said = capsys.readouterr().err
    assert "spawned worker 1 was ended by signal 9" in said and "; it is started again" in said
    assert "going on after" in said


def words_after(process: psutil.Process, option: str) -> list[str]:
    """The word after an option of its command line."""
    words = process.cmdline()
    return [after for before, after in pairwise(words) if before == option]


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
def test_they_do_not_outlive_a_manager_that_is_killed(tmp_path):
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
        env=clean_environment({"TMPDIR": str(tmp_path)}),
    ) as manager:
        assert manager.stdout is not None
        worker = psutil.Process(int(manager.stdout.readline()))
        manager.send_signal(signal.SIGKILL)
    worker.wait(120)
    assert list(tmp_path.glob("comboio*")) == []  # nor any file of ours
