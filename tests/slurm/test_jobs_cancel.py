"""`manager cancel` on a real cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


def test_a_running_job_is_cancelled_by_its_id(slurm):
    job_id = slurm.submit("--job-name=long", "--wrap", "sleep 600")
    slurm.wait_running(job_id)
    answer = slurm.manager("cancel", job_id, check=True)
    assert answer.stdout.startswith(f"cancelled job {job_id} (long), which had run for 0:0")
    assert answer.stdout.endswith(" on node1.\n")
    assert slurm.wait(job_id)["JobState"] == "CANCELLED"


def test_a_job_that_is_over_is_left_alone(slurm):
    job_id = slurm.submit("--job-name=short", "--wrap", "exit 3")
    slurm.wait(job_id)
    answer = slurm.manager("cancel", job_id, check=True)
    assert answer.stdout == f"job {job_id} (short) was over already: it failed with exit code 3.\n"


def test_several_jobs_are_cancelled_at_once(slurm):
    jobs = [slurm.submit("--hold", "--wrap", "true") for _ in range(3)]
    answer = slurm.manager("cancel", *jobs, check=True)
    assert len(answer.stdout.splitlines()) == 3
    assert {slurm.job(it)["JobState"] for it in jobs} == {"CANCELLED"}


def test_all_jobs_with_a_name_are_cancelled_and_no_others(slurm):
    twins = [slurm.submit("--hold", "--job-name=my twin", "--wrap", "true") for _ in range(2)]
    other = slurm.submit("--hold", "--job-name=my twin 2", "--wrap", "true")
    answer = slurm.manager("cancel", "--name", "my twin", check=True)
    assert answer.stdout.splitlines() == [
        f"cancelled job {job_id} (my twin), which had not started." for job_id in twins
    ]
    assert {slurm.job(it)["JobState"] for it in twins} == {"CANCELLED"}
    assert slurm.job(other)["JobState"] == "PENDING"
    again = slurm.manager("cancel", "--name", "my twin", check=True)
    assert again.stdout == f"job {twins[-1]} (my twin) was over already: it was cancelled.\n"


def test_one_task_of_an_array_is_cancelled_alone(slurm):
    job_id = slurm.submit("--array=0-2", "--hold", "--job-name=sweep", "--wrap", "true")
    slurm.manager("cancel", f"{job_id}_1", check=True)
    said = slurm.sh("squeue", "-h", "-r", "-o", "%i").stdout.split()
    assert sorted(said) == [f"{job_id}_0", f"{job_id}_2"]
    slurm.manager("cancel", job_id, check=True)
    assert slurm.sh("squeue", "-h").stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["99999"], "there is no job 99999 on cluster "),
        (
            ["12a"],
            "'12a' is not the id of a job, which is a number: to cancel by name, pass --name",
        ),
        (["--name", "nobody"], "you have no job named 'nobody' on cluster "),
        ([], "say which job to cancel"),
        (["5", "--name", "x"], "say which job to cancel"),
    ],
)
def test_a_job_that_there_is_not_is_the_callers_mistake(slurm, words, said):
    answer = slurm.manager("cancel", *words)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(f"manager: {said}")
    assert len(answer.stderr.splitlines()) == 1


def test_nothing_is_cancelled_where_one_of_several_ids_is_wrong(slurm):
    job_id = slurm.submit("--hold", "--wrap", "true")
    assert slurm.manager("cancel", job_id, "99999").returncode == 2
    assert slurm.job(job_id)["JobState"] == "PENDING"
