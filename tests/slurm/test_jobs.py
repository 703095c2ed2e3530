"""`manager jobs` and `manager wait` on a real cluster without accounting."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from manager.slurm.records import Records
from tests.support.processes import Answer
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

ODD_NAME = "two words | and 'more' % $HOME JobState=FAILED"


@pytest.fixture(scope="module", autouse=True)
def _only_our_own_records(slurm: SlurmCluster) -> None:
    """Jobs that other tests have submitted are not listed here."""
    slurm.jobs_file.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def ended(slurm: SlurmCluster) -> dict[str, int]:
    """Jobs that have ended in every way that can be brought about, by their state."""
    node1 = ("--nodelist=node1", "--time=1")
    started = slurm.folder / "slow.out"
    jobs = {
        "TIMEOUT": slurm.submit(
            *node1, "-J", "slow", "-o", started, "--wrap", "echo on; sleep 600"
        ),
        "CANCELLED": slurm.submit(*node1, "--job-name=stopped", "--wrap", "sleep 600"),
        "COMPLETED": slurm.submit(*node1, "--job-name", ODD_NAME, "--wrap", "echo all is well"),
        "FAILED": slurm.submit(
            *node1,
            "--job-name=bad",
            "--wrap",
            "echo 'manager: the model is too large.'; echo goodbye; exit 3",
        ),
        "KILLED": slurm.submit(*node1, "--job-name=killed", "--wrap", "kill -KILL $$"),
    }
    if os.getuid() == 0:  # only a node with a network of its own can be cut off
        jobs["NODE_FAIL"] = slurm.submit("--nodelist=node3", "--wrap", "srun sleep 600")
        slurm.wait_running(jobs["NODE_FAIL"])
        slurm.node("crash", 3)
        slurm.sh("scontrol", "update", "nodename=node3", "state=down", "reason=test")
    slurm.wait_text(started, "on")
    slurm.time_out(jobs["TIMEOUT"])
    slurm.wait_running(jobs["CANCELLED"])
    slurm.sh("scancel", jobs["CANCELLED"])
    for job_id in jobs.values():
        slurm.wait(job_id)
    slurm.mend()
    return jobs


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


def own(records: Records) -> dict[str, str]:
    return {"COMBOIO_JOBS_FILE": str(records.path)}


def listed(slurm: SlurmCluster, *words: str, env: dict[str, str] | None = None) -> dict[str, dict]:
    answer = slurm.manager("jobs", "--json", *words, check=True, env=env)
    return {job["id"]: job for job in json.loads(answer.stdout)}


def wait(slurm: SlurmCluster, job_id: object, *words: str) -> Answer:
    return slurm.manager("wait", job_id, *words)


# --- manager jobs


def test_without_jobs_it_says_so(slurm, records):
    answer = slurm.manager("jobs", env=own(records))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("You have no jobs")
    assert slurm.manager("jobs", "--json", env=own(records), check=True).stdout == "[]\n"


def test_a_running_job_is_shown_with_its_nodes_and_how_long_it_runs(slurm, records):
    job_id = slurm.submit("--nodes=2", "--time=5", "--job-name", ODD_NAME, "--wrap", "sleep 600")
    slurm.record(records, job_id)
    slurm.wait_running(job_id)
    job = listed(slurm, env=own(records))[str(job_id)]
    assert (job["state"], job["name"], job["backend"]) == ("RUNNING", ODD_NAME, "pipeline")
    assert (job["num_nodes"], job["nodes"], job["limit_s"]) == (2, "node[1-2]", 300)
    assert job["partition"] == "debug" and 0 <= job["elapsed_s"] < 60
    assert (job["reason"], job["exit_code"], job["ended_at"]) == (None, None, None)
    lines = slurm.manager("jobs", env=own(records), check=True).stdout.splitlines()
    assert lines[0].split() == ["JOB", "NAME", "BACKEND", "STATE", "NODES", "ELAPSED", "REMARK"]
    assert ODD_NAME in lines[1] and "RUNNING" in lines[1] and "node[1-2]" in lines[1]


def test_a_job_that_waits_says_why(slurm):
    too_large = slurm.submit("--nodes=5", "--partition=long", "--wrap", "true")
    held = slurm.submit("--hold", "--wrap", "true")
    later = slurm.submit("--begin=now+1hour", "--wrap", "true")
    after = slurm.submit(f"--dependency=afterok:{held}", "--wrap", "true")
    slurm.wait_reason(too_large, "PartitionNodeLimit")
    jobs = listed(slurm)
    remarks = {job_id: jobs[str(job_id)]["remark"] for job_id in (too_large, held, later, after)}
    assert remarks[too_large].startswith(
        "PartitionNodeLimit: it asks for 5 nodes, more than partition long has"
    )
    assert f"`scontrol release {held}`" in remarks[held]
    assert remarks[later].startswith("BeginTime: ")
    assert remarks[after].startswith("Dependency: ")
    assert {job["state"] for job in jobs.values()} == {"PENDING"}
    assert jobs[str(held)]["reason"] == "JobHeldUser"


def test_tasks_of_an_array_are_told_apart(slurm):
    job_id = slurm.submit("--array=0-4%2", "--job-name=sweep", "--wrap", "sleep 600")
    slurm.wait_running(f"{job_id}_1")
    jobs = listed(slurm)
    assert {it: jobs[it]["state"] for it in jobs} == {
        f"{job_id}_0": "RUNNING",
        f"{job_id}_1": "RUNNING",
        f"{job_id}_[2-4%2]": "PENDING",
    }
    assert {job["name"] for job in jobs.values()} == {"sweep"}


def test_formats_and_filters_of_the_users_own_change_nothing(slurm):
    job_id = slurm.submit("--wrap", "sleep 600")
    slurm.wait_running(job_id)
    env = {
        "SQUEUE_FORMAT": "%i",
        "SQUEUE_FORMAT2": "jobid",
        "SQUEUE_STATES": "PENDING",
        "SQUEUE_PARTITION": "long",
        "SLURM_TIME_FORMAT": "relative",
        "LC_ALL": "pt_BR.UTF-8",
    }
    assert listed(slurm, env=env)[str(job_id)]["state"] == "RUNNING"


def test_how_jobs_ended_is_remembered_when_slurm_has_forgotten(slurm, ended, records, forgetful):
    for job_id in ended.values():
        slurm.record(records, job_id)
    assert "was cancelled" in slurm.manager("jobs", env=own(records), check=True).stdout
    jobs = listed(slurm, env={**own(records), **forgetful(slurm)})
    told = {state: jobs[str(job_id)]["remark"] for state, job_id in ended.items()}
    assert told["COMPLETED"] == "completed"
    assert told["FAILED"] == "failed with exit code 3"
    assert told["KILLED"] == "failed: signal 9 ended it"
    assert told["CANCELLED"] == "was cancelled"
    assert told["TIMEOUT"].startswith("reached its time limit")
    assert told.get("NODE_FAIL", "lost a node").startswith("lost a node")
    assert jobs[str(ended["FAILED"])]["exit_code"] == 3


def test_a_recorded_job_that_nobody_knows_any_more_is_shown_all_the_same(slurm, records, forgetful):
    slurm.record(records, 77, name="old")
    job = listed(slurm, env={**own(records), **forgetful(slurm)})["77"]
    assert (job["state"], job["name"], job["is_over"]) == ("UNKNOWN", "old", True)
    assert "not known to Slurm any more" in job["remark"]


def test_records_of_another_cluster_are_not_mixed_up_with_jobs_of_this_one(slurm, records):
    job_id = slurm.submit("--job-name=here", "--wrap", "sleep 600")
    slurm.record(records, job_id)
    text = records.path.read_text().replace(slurm.name, "elsewhere")
    records.path.write_text(text)
    assert listed(slurm, env=own(records))[str(job_id)]["backend"] is None


def test_ended_jobs_that_were_not_submitted_from_here_are_shown_on_request(slurm, ended, records):
    assert listed(slurm, env=own(records)) == {}
    jobs = listed(slurm, "--all", env=own(records))
    assert jobs[str(ended["COMPLETED"])]["name"] == ODD_NAME


def test_records_that_cannot_be_read_or_written_are_one_sentence(slurm, records, tmp_path):
    answer = slurm.manager("jobs", env={"COMBOIO_JOBS_FILE": str(tmp_path)})
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == (
        f"manager: cannot read the records of jobs in {tmp_path}: Is a directory; mend that, or "
        "set COMBOIO_JOBS_FILE to another file.\n"
    )


# --- manager wait


def test_wait_says_how_each_job_ended_and_leaves_with_its_exit_code(slurm, ended):
    said = {state: wait(slurm, job_id) for state, job_id in ended.items()}
    assert {state: it.returncode for state, it in said.items()} == {
        state: 0 if state == "COMPLETED" else 1 for state in ended
    }
    done = said.pop("COMPLETED")
    assert done.stdout.startswith(f"job {ended['COMPLETED']} ({ODD_NAME}) completed in 0:0")
    assert done.stderr == ""
    assert {it.stdout for it in said.values()} == {""}
    assert all(len(it.stderr.splitlines()) == 1 for it in said.values())
    assert said["FAILED"].stderr == (
        f"manager: job {ended['FAILED']} (bad) failed with exit code 3. It said last: manager: "
        "the model is too large.\n"
    )
    assert "(stopped) was cancelled." in said["CANCELLED"].stderr
    assert "(slow) reached its time limit of 1:00: submit it" in said["TIMEOUT"].stderr
    assert "(killed) failed: signal 9 ended it" in said["KILLED"].stderr
    assert "lost a node" in said.get("NODE_FAIL", Answer(1, "", "lost a node")).stderr


def test_wait_waits_for_a_job_that_has_not_started_and_says_why(slurm):
    job_id = slurm.submit("--hold", "--job-name=patience", "--wrap", "true")
    with slurm.start_manager("wait", "patience") as waiting:
        assert waiting.stderr is not None
        assert "JobHeldUser" in waiting.stderr.readline()
        slurm.sh("scontrol", "release", job_id)
        out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert out.startswith(f"job {job_id} (patience) completed in ")


def test_wait_gives_up_in_time_and_the_job_goes_on(slurm):
    job_id = slurm.submit("--job-name=long", "--wrap", "sleep 600")
    slurm.wait_running(job_id)
    answer = wait(slurm, job_id, "--timeout", "0.5")
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"manager: job {job_id} (long) is RUNNING on node1 for 0:0")
    assert "after 0.5 s (--timeout)" in answer.stderr
    assert slurm.job(job_id)["JobState"] == "RUNNING"


def test_ctrl_c_ends_the_wait_and_not_the_job(slurm):
    job_id = slurm.submit("--hold", "--wrap", "true")
    with slurm.start_manager("wait", job_id) as waiting:
        assert waiting.stderr is not None
        waiting.stderr.readline()  # why it waits: from now on, it can be interrupted
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate(timeout=120)
    assert (waiting.returncode, err) == (130, "manager: interrupted\n")
    assert slurm.job(job_id)["JobState"] == "PENDING"


def test_a_requeued_job_is_waited_for_until_it_ends_in_the_end(slurm):
    script = 'echo run "$SLURM_RESTART_COUNT"; test -n "$SLURM_RESTART_COUNT" || sleep 600'
    job_id = slurm.submit("--requeue", "--job-name=again", "--wrap", script)
    log = slurm.folder / f"slurm-{job_id}.out"
    slurm.wait_text(log, "run")
    with slurm.start_manager("wait", job_id) as waiting:
        slurm.sh("scontrol", "requeue", job_id)
        assert waiting.stderr is not None
        assert "BeginTime" in waiting.stderr.readline()
        slurm.start_requeued(job_id)
        out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert "completed" in out
    assert "run 1" in log.read_text()


def test_an_array_is_waited_for_as_a_whole_and_its_worst_task_counts(slurm):
    job_id = slurm.submit(
        *("--array=0-3%2", "--job-name=sweep", "--output", "sweep-%A-%a.log"),
        *("--wrap", 'test "$SLURM_ARRAY_TASK_ID" != 2 || { echo "worker: no room"; exit 5; }'),
    )
    answer = wait(slurm, job_id)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.splitlines()[-1] == (
        f"manager: task {job_id}_2 of job {job_id} (sweep) failed with exit code 5. It said last: "
        "worker: no room"
    )
    assert wait(slurm, f"{job_id}_3").returncode == 0
    assert wait(slurm, f"{job_id}_2").returncode == 1


def test_a_job_is_found_by_its_name_the_latest_first(slurm):
    first = slurm.submit("--hold", "--job-name=twin", "--wrap", "true")
    second = slurm.submit("--job-name=twin", "--wrap", "true")
    slurm.wait(second)
    slurm.sh("scancel", first)
    slurm.wait(first)
    assert wait(slurm, "twin").stdout.startswith(f"job {second} (twin) completed")


@pytest.mark.parametrize("command", ["wait", "logs"])
def test_a_job_that_there_is_not_is_the_callers_mistake(slurm, command):
    slurm.submit("--hold", "--job-name=training", "--wrap", "true")
    unknown = slurm.manager(command, "99999")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert f"there is no job 99999 on cluster {slurm.name}" in unknown.stderr
    misspelt = slurm.manager(command, "trainnig")
    assert (misspelt.returncode, misspelt.stdout) == (2, "")
    assert "no job named 'trainnig'" in misspelt.stderr
    assert "did you mean 'training'?" in misspelt.stderr
