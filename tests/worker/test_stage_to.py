"""The worker's `--stage-to`: what it refuses, and what it does while another worker copies."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import sys
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint
from engine.staging import Staged
from proto.errors import UsageError, WorkerRefused
from tests.support.processes import ROOT, WorkerProcess, clean_environment, run_worker
from tests.support.small_disk import why_no_small_disk, with_small_disk
from tests.support.wire import open_link
from worker import cli, logs
from worker.config import WorkerConfig, parse_stage_to
from worker.loading import Loading, LoadingAborted

QUIET = ("--listen", "127.0.0.1:0", "--log-level", "warning")


def test_a_folder_without_a_name_is_refused_and_the_home_folder_is_known() -> None:
    with pytest.raises(UsageError, match="--stage-to '' names no folder"):
        parse_stage_to(" ")
    assert parse_stage_to("~/x") == Path.home() / "x"


def test_the_folder_may_stand_in_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_of().stage_to is None
    (tmp_path / "comboio.toml").write_text('[worker]\nstage-to = "/scratch/a"\n')
    assert config_of().stage_to == Path("/scratch/a")
    monkeypatch.setenv("COMBOIO_STAGE_TO", "/scratch/b")
    assert config_of().stage_to == Path("/scratch/b")
    assert config_of("--stage_to", "/scratch/c").stage_to == Path("/scratch/c")


def config_of(*args: str) -> WorkerConfig:
    invocation = cli._parse(list(args))
    assert isinstance(invocation, cli.Invocation)
    return invocation.config


def test_percent_counts_the_bytes_that_are_staged_and_then_those_that_are_loaded(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(logs.ROOT), "propagate", True)
    loading, seen = Loading(), []
    copied = Staged(
        folder=tmp_path, slice_bytes=200, copied_bytes=200, elapsed_s=0.5, is_same_disk=True
    )
    with caplog.at_level(logging.INFO, logger=logs.ROOT):
        for call in (
            lambda: loading.copying(100, 200),
            lambda: loading.copying(200, 200),
            lambda: loading.staged(copied),
            lambda: loading.update(50, 100),
            lambda: loading.update(100, 100),
        ):
            call()
            seen.append(loading.percent)
    loading.close()
    assert seen == [25, 50, 50, 75, 100]
    said = {entry.getMessage(): entry for entry in caplog.records}
    assert list(said)[:2] == ["staging", "staged"]
    assert vars(said["staged"])["fields"]["bytes"] == 200
    assert any("the model's own file system" in it for it in said)


def test_staging_that_was_given_up_stops_at_its_next_bytes(tmp_path: Path) -> None:
    loading = Loading()
    loading.is_aborted = True
    with pytest.raises(LoadingAborted):
        loading.copying(1, 2)
    with pytest.raises(LoadingAborted):
        loading.waiting(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_in_one_line() -> None:
    done = run_worker("--stage-to", "/sys/comboio", *QUIET)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("worker: --stage-to: /sys/comboio cannot be written (")


def test_a_disk_that_is_too_small_is_refused_with_what_is_needed_and_what_is_free(
    tmp_path: Path,
) -> None:
    if reason := why_no_small_disk():
        pytest.skip(reason)
    command = [sys.executable, "-m", "worker", "--stage-to", str(tmp_path), *QUIET]
    done = with_small_disk("1m", tmp_path, command, clean_environment({"PYTHONPATH": str(ROOT)}))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"worker: --stage-to {tmp_path}: layers 0:8 of demo need ")
    assert "MB there, and 1.0 MB are free: make room" in line


async def test_a_worker_that_waits_for_anothers_copy_says_so_and_can_be_stopped(
    checkpoint: Path, tmp_path: Path
) -> None:
    above = tmp_path / f"{checkpoint.name}-{Checkpoint(str(checkpoint)).fingerprint[:12]}"
    above.mkdir()
    with (above / "layers-1-3.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        arguments = ("--model", str(checkpoint), "--layers", "1:3", "--stage-to", str(tmp_path))
        with WorkerProcess(*arguments, "--log-format", "json", wait=False) as worker:
            address = json.loads(await asyncio.to_thread(worker.wait_for_stderr, "listening"))[
                "address"
            ]
            line = await asyncio.to_thread(worker.wait_for_stderr, "waiting for another worker")
            assert json.loads(line)["folder"] == str(above / "layers-1-3")
            with pytest.raises(WorkerRefused, match="is still loading"):
                await open_link(address)
            assert await asyncio.to_thread(worker.stop) == 0
            assert "Traceback" not in worker.stderr
    assert not (above / "layers-1-3").exists()


def test_two_workers_with_the_same_slice_at_the_same_time_copy_it_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(checkpoint), "--layers", "1:3", "--stage-to", str(tmp_path / "a"))
    with (
        WorkerProcess(*arguments, "--log-format", "json", wait=False) as one,
        WorkerProcess(*arguments, "--log-format", "json", wait=False) as two,
    ):
        one.wait_until_ready()
        two.wait_until_ready()
        said = [json.loads(line) for it in (one, two) for line in it.stderr.splitlines()]
    events = [it["event"] for it in said]
    assert (events.count("staged"), events.count("staged copy reused")) == (1, 1)
    (staged,) = (it for it in said if it["event"] == "staged")
    assert float(staged["seconds"]) >= 0
    assert staged["bytes"] > 0
