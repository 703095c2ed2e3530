"""Jobs on a cluster that keeps accounts: Slurm's controller forgets them, sacct does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from manager.slurm.jobs import poll
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

ODD_NAME = "two words | and 'more' JobState=FAILED"


@pytest.fixture(scope="module")
def accounted(slurm_with_accounting: SlurmCluster) -> dict[str, int]:
    """Jobs whose ends have arrived in the accounts."""
    cluster = slurm_with_accounting
    jobs = {
        "COMPLETED": cluster.submit("-N2", "-J", ODD_NAME, "--wrap", "srun hostname"),
        "FAILED": cluster.submit("-J", "bad", "--wrap", "exit 3"),
        "KILLED": cluster.submit("-J", "killed", "--wrap", "kill -KILL $$"),
        "CANCELLED": cluster.submit("-J", "stopped", "--wrap", "sleep 600"),
        "ARRAY": cluster.submit(
            "-J", "sweep", "--array=0-1", "--wrap", "exit $SLURM_ARRAY_TASK_ID"
        ),
    }
    cluster.wait_running(jobs["CANCELLED"])
    cluster.sh("scancel", jobs["CANCELLED"])
    for job_id in jobs.values():
        cluster.wait(job_id)
        cluster.wait_accounted(job_id)
    return jobs


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm_with_accounting: SlurmCluster) -> Iterator[None]:
    yield
    slurm_with_accounting.cancel_all()


@pytest.fixture
def cluster(slurm_with_accounting: SlurmCluster) -> SlurmCluster:
    return slurm_with_accounting


def test_a_job_that_only_the_accounts_know_is_waited_for_no_more(cluster, accounted, forgetful):
    said = {
        state: cluster.manager("wait", job_id, env=forgetful(cluster))
        for state, job_id in accounted.items()
    }
    assert {state: it.returncode for state, it in said.items()} == {
        state: 0 if state == "COMPLETED" else 1 for state in accounted
    }
    assert said["COMPLETED"].stdout.startswith(
        f"job {accounted['COMPLETED']} ({ODD_NAME}) completed"
    )
    assert said["COMPLETED"].stdout.endswith(" on node[1-2]\n")
    assert "(bad) failed with exit code 3." in said["FAILED"].stderr
    assert "(killed) failed: signal 9 ended it." in said["KILLED"].stderr
    assert "(stopped) was cancelled." in said["CANCELLED"].stderr
    array = accounted["ARRAY"]
    assert f"task {array}_1 of job {array} (sweep) failed with exit code 1." in said["ARRAY"].stderr


def test_the_accounts_are_asked_for_records_that_are_not_settled(
    cluster, accounted, records, forgetful
):
    cluster.record(records, accounted["FAILED"], name="bad")
    env = {**forgetful(cluster), "COMBOIO_JOBS_FILE": str(records.path)}
    jobs = json.loads(cluster.manager("jobs", "--json", env=env, check=True).stdout)
    assert [(job["state"], job["exit_code"], job["name"]) for job in jobs] == [("FAILED", 3, "bad")]
    settled = records.find(str(accounted["FAILED"]))
    assert settled is not None
    assert (settled.state, settled.exit_code) == ("FAILED", 3)
    assert settled.ended_at == jobs[0]["ended_at"]


def test_the_accounts_and_the_controller_tell_the_same(cluster, accounted, forgetful):
    ids = [str(job_id) for job_id in accounted.values()]
    by_controller = poll(ids, environ=cluster.env)
    by_accounts = poll(ids, environ={**cluster.env, **forgetful(cluster)})
    for job_id in ids:
        live, kept = by_controller.of(job_id), by_accounts.of(job_id)
        assert [facts(it) for it in live] == [facts(it) for it in kept]


def test_a_job_that_neither_knows_is_the_callers_mistake(cluster, accounted, forgetful):
    answer = cluster.manager("wait", "99999", env=forgetful(cluster))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "there is no job 99999" in answer.stderr


def test_live_jobs_are_shown_as_on_any_cluster(cluster):
    job_id = cluster.submit("--hold", "--job-name=held", "--wrap", "true")
    jobs = json.loads(cluster.manager("jobs", "--json", check=True).stdout)
    assert [(job["id"], job["state"]) for job in jobs] == [(str(job_id), "PENDING")]
    cluster.manager("cancel", "--name", "held", check=True)
    assert cluster.wait(job_id)["JobState"] == "CANCELLED"


def facts(job):
    """What both must tell alike: not the exit code of a job that was stopped."""
    exit_code = None if job.state == "CANCELLED" else job.exit_code
    return replace(job, reason="", log=None, exit_code=exit_code)
