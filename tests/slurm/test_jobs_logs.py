"""`manager logs` on a real cluster: whole logs, growing ones, and none."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


@pytest.fixture
def two_parts(slurm: SlurmCluster, tmp_path: Path) -> tuple[Path, Path]:
    """A script for sbatch that prints in two parts, and the file that lets the second one come."""
    script, go = tmp_path / "job.sh", tmp_path / "go"
    script.write_text(
        f"#!/bin/bash\necho first\nuntil [ -e {go} ]; do sleep 0.1; done\nprintf 'second\\nthird'\n"
    )
    return script, go


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_a_log_is_shown_whole_or_from_its_last_lines(slurm):
    job_id = slurm.submit("-o", "odd name %x.%j", "-J", "a b", "--wrap", "seq 5000; echo -n end")
    slurm.wait(job_id)
    whole = slurm.manager("logs", job_id, check=True)
    assert whole.stdout == (slurm.folder / f"odd name a b.{job_id}").read_text()
    assert whole.stderr == ""
    assert slurm.manager("logs", job_id, "--lines", "3").stdout == "4999\n5000\nend"
    assert slurm.manager("logs", job_id, "--lines", "0").stdout == ""
    assert slurm.manager("logs", job_id, "--lines", "9999").stdout == whole.stdout
    assert slurm.manager("logs", "a b", "--lines", "1").stdout == "end"


def test_a_log_is_followed_until_the_job_is_over(slurm, two_parts):
    script, go = two_parts
    job_id = slurm.submit("--job-name=parts", script)
    with slurm.start_manager("logs", "-f", job_id) as following:
        assert first_line(following) == "first\n"
        assert slurm.job(job_id)["JobState"] == "RUNNING"
        go.touch()
        out, err = following.communicate(timeout=120)
    assert (following.returncode, out) == (0, "second\nthird")
    assert err.splitlines()[-1] == f"manager: job {job_id} (parts) completed"


def test_a_job_that_waits_is_followed_from_its_start(slurm, two_parts):
    script, go = two_parts
    go.touch()
    job_id = slurm.submit("--hold", script)
    with slurm.start_manager("logs", "--follow", job_id) as following:
        assert following.stderr is not None
        assert f"job {job_id} (job.sh) waits: JobHeldUser" in following.stderr.readline()
        slurm.sh("scontrol", "release", job_id)
        out, _ = following.communicate(timeout=120)
    assert (following.returncode, out) == (0, "first\nsecond\nthird")


def test_ctrl_c_leaves_the_log_and_not_the_job(slurm, two_parts):
    job_id = slurm.submit(two_parts[0])
    with slurm.start_manager("logs", "-f", job_id) as following:
        assert first_line(following) == "first\n"
        following.send_signal(signal.SIGINT)
        out, err = following.communicate(timeout=120)
    assert (following.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "manager: interrupted"
    assert slurm.job(job_id)["JobState"] == "RUNNING"


def test_following_a_job_that_failed_shows_all_and_says_how_it_ended(slurm):
    job_id = slurm.submit("--job-name=bad", "--wrap", "echo before; exit 7")
    answer = slurm.manager("logs", "-f", job_id)
    assert (answer.returncode, answer.stdout) == (0, "before\n")
    assert answer.stderr.splitlines()[-1] == (
        f"manager: job {job_id} (bad) failed with exit code 7"
    )


def test_a_requeued_job_is_followed_into_its_second_run(slurm):
    script = 'echo run "$SLURM_RESTART_COUNT"; test -n "$SLURM_RESTART_COUNT" || sleep 600'
    job_id = slurm.submit("--requeue", "--open-mode=truncate", "--wrap", script)
    with slurm.start_manager("logs", "-f", job_id) as following:
        assert first_line(following) == "run \n"
        slurm.sh("scontrol", "requeue", job_id)
        slurm.start_requeued(job_id)
        out, err = following.communicate(timeout=120)
    assert following.returncode == 0, err
    assert "run 1" in (slurm.folder / f"slurm-{job_id}.out").read_text()
    # A file written anew between two looks, and longer than it was, looks like one that grew.
    assert "1\n" in out


def test_each_task_of_an_array_has_a_log_of_its_own(slurm):
    job_id = slurm.submit("--array=0-2", "--wrap", "echo task $SLURM_ARRAY_TASK_ID")
    slurm.manager("wait", job_id, check=True)
    which = slurm.manager("logs", job_id)
    assert (which.returncode, which.stdout) == (2, "")
    assert f"name one ({job_id}_0, {job_id}_1, {job_id}_2)" in which.stderr
    assert slurm.manager("logs", f"{job_id}_1", check=True).stdout == "task 1\n"


def test_the_log_of_a_recorded_job_is_found_when_slurm_has_forgotten(slurm, records, forgetful):
    job_id = slurm.submit("--job-name=kept", "-o", "%x-%j.log", "--wrap", "echo kept")
    slurm.wait(job_id)
    slurm.record(records, job_id, name="kept", log="%x-%j.log")
    env = {**forgetful(slurm), "COMBOIO_JOBS_FILE": str(records.path)}
    assert slurm.manager("logs", job_id, env=env).stdout == "kept\n"
    assert slurm.manager("logs", "kept", env=env).stdout == "kept\n"


def test_the_logs_of_a_recorded_array_are_told_apart(slurm, records):
    job_id = slurm.submit("--array=0-1", "-o", "x-%A_%a.log", "--wrap", "hostname; echo $0")
    slurm.manager("wait", job_id, check=True)
    slurm.record(records, job_id, log="x-%A_%a.log")
    env = {"COMBOIO_JOBS_FILE": str(records.path)}
    assert slurm.manager("logs", job_id, env=env).returncode == 2
    said = slurm.manager("logs", f"{job_id}_1", env=env, check=True).stdout
    assert said == (slurm.folder / f"x-{job_id}_1.log").read_text()


def test_a_job_without_a_log_is_one_sentence(slurm):
    job_id = slurm.submit("--hold", "--job-name=never", "--wrap", "true")
    waits = slurm.manager("logs", job_id)
    assert (waits.returncode, waits.stdout) == (1, "")
    assert f"job {job_id} (never) has not started, so it has no log yet" in waits.stderr
    slurm.sh("scancel", job_id)
    slurm.wait(job_id)
    for words in (["logs", job_id], ["logs", "-f", job_id]):
        never = slurm.manager(*words)
        assert (never.returncode, never.stdout) == (1, "")
        assert f"job {job_id} (never) was cancelled and left no log at " in never.stderr
        assert len(never.stderr.splitlines()) == 1


def test_a_log_that_is_a_folder_is_one_sentence(slurm, records):
    job_id = slurm.submit("--wrap", "true")
    slurm.wait(job_id)
    slurm.record(records, job_id, log=str(slurm.folder))
    answer = slurm.manager("logs", job_id, env={"COMBOIO_JOBS_FILE": str(records.path)})
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == f"manager: cannot read the log {slurm.folder}: Is a directory.\n"


def test_bytes_that_are_no_text_are_shown_as_they_are(slurm, tmp_path):
    job_id = slurm.submit("--wrap", "printf 'a\\377\\000b\\n'")
    slurm.wait(job_id)
    with (
        (tmp_path / "out").open("wb") as out,
        slurm.start_manager("logs", job_id, stdout=out) as it,
    ):
        assert it.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == b"a\xff\x00b\n"


def test_nobody_has_to_read_all_of_a_log(slurm):
    job_id = slurm.submit("--wrap", "seq 300000")
    slurm.wait(job_id)
    with slurm.start_manager("logs", job_id) as showing:
        assert first_line(showing) == "1\n"
        assert showing.stdout is not None and showing.stderr is not None
        showing.stdout.close()
        assert (showing.wait(60), showing.stderr.read()) == (1, "")
