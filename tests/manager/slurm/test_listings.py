"""What squeue, sacct and scontrol print, read back."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis.strategies import characters, text

from manager.slurm.job import tasks_in
from manager.slurm.listings import (
    ACCOUNT_FIELDS,
    QUEUE_FORMAT,
    RECORD,
    UNIT,
    parse_accounts,
    parse_clock,
    parse_exit_code,
    parse_pages,
    parse_queue,
    parse_time,
)

NAMES = text(characters(blacklist_characters=RECORD + UNIT, blacklist_categories=("Cs",)))

PAGE = """\
JobId=14 ArrayJobId=12 ArrayTaskId=1 JobName={name}
   UserId=ana(1001) GroupId=lab(100) MCS_label=N/A
   Priority=4294901756 Nice=0 Account=(null) QOS=normal
   JobState=FAILED Reason=NonZeroExitCode Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=3:0
   RunTime=1-00:01:02 TimeLimit=UNLIMITED TimeMin=N/A
   SubmitTime=2026-11-21T02:59:44 EligibleTime=2026-11-21T02:59:44
   StartTime=2026-11-21T03:00:00 EndTime=2026-11-22T03:01:02 Deadline=N/A
   Partition=long AllocNode:Sid=login:77
   NodeList=node[1-2]
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   Command=/home/ana/run.sh JobState=RUNNING NumNodes=9
   WorkDir=/home/ana/my work
   StdOut=/home/ana/my work/out 14.log
   Power=

"""


def queued(*cells: str) -> str:
    return RECORD + UNIT.join(cells) + "\n"


def local(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@given(name=NAMES)
def test_any_name_comes_through_squeue(name):
    first = queued(
        *("7", "7", "ana", "debug", "RUNNING", "None", "2", "node[1-2]", "1:05", "2-00:00:00"),
        *("2026-11-21T02:59:44", "2026-11-21T03:00:00", "2026-11-23T03:00:00", name),
    )
    second = queued(
        *("12_[3-4%1]", "12", "ana", "debug", "PENDING", "Resources", "1-1", "", "0:00", "NOT_SET"),
        *("2026-11-21T02:59:44", "N/A", "N/A", name),
    )
    running, waiting = parse_queue(first + second)
    assert (running.name, waiting.name) == (name, name)
    assert (running.elapsed_s, running.limit_s, running.num_nodes) == (65, 172800, 2)
    assert running.submitted_at == local("2026-11-21T02:59:44")
    assert (waiting.id, waiting.state, waiting.reason) == ("12_[3-4%1]", "PENDING", "Resources")
    assert (waiting.num_nodes, waiting.nodes, waiting.limit_s) == (1, "", None)
    assert (waiting.started_at, waiting.exit_code) == (None, None)


@given(name=NAMES)
def test_any_name_comes_through_sacct(name):
    cells = (
        *("7", "7", "ana", "debug", "CANCELLED by 1001", "None", "2", "None assigned", "3661"),
        *("00:10:00", "2026-11-21T02:59:44", "Unknown", "2026-11-21T03:00:00", "0:15", name),
    )
    first, second = parse_accounts(2 * (UNIT.join(cells) + "\n"))
    assert first.name == second.name == name
    assert (first.state, first.exit_code, first.elapsed_s) == ("CANCELLED", 143, 3661)
    assert (first.nodes, first.limit_s, first.started_at) == ("", 600, None)


@given(name=NAMES.filter(lambda it: "\nJobId=" not in it and "\n   UserId=" not in it))
def test_any_name_comes_through_scontrol(name):
    (job,) = parse_pages(PAGE.replace("{name}", name))
    assert (job.id, job.raw_id, job.name) == ("12_1", "14", name)
    assert (job.user, job.state, job.exit_code) == ("ana", "FAILED", 3)
    assert (job.partition, job.nodes, job.num_nodes) == ("long", "node[1-2]", 2)
    assert (job.elapsed_s, job.limit_s) == (86462, None)
    assert job.log == "/home/ana/my work/out 14.log"


def test_a_name_that_looks_like_fields_is_a_name():
    name = "x JobState=RUNNING UserId=root(0)\n   UserId=root(0)"
    (job,) = parse_pages(PAGE.replace("{name}", name))
    assert (job.name, job.user, job.state) == (name, "ana", "FAILED")


def test_lines_that_are_no_jobs_are_passed_over():
    assert parse_queue("CLUSTER: other\n") == []
    assert parse_accounts("") == []
    assert parse_pages("No jobs in the system\n") == []


def test_as_many_fields_are_asked_for_as_are_read():
    assert QUEUE_FORMAT.count(UNIT) == 13
    assert len(ACCOUNT_FIELDS) == 15


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("0:05", 5),
        ("59:59", 3599),
        ("1:00:00", 3600),
        ("2-03:00:00", 183600),
        ("00:10:00", 600),
        ("UNLIMITED", None),
        ("Partition_Limit", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_spans_of_time_are_seconds(written, seconds):
    assert parse_clock(written) == seconds


@pytest.mark.parametrize("written", ["N/A", "Unknown", "None", "", "NONE"])
def test_a_time_that_is_not_there_is_none(written):
    assert parse_time(written) is None


@pytest.mark.parametrize(
    ("written", "code"), [("0:0", 0), ("3:0", 3), ("0:9", 137), ("1:15", 143), ("", None)]
)
def test_an_exit_code_is_as_shells_have_it(written, code):
    assert parse_exit_code(written) == code


@pytest.mark.parametrize(
    ("job_id", "tasks"),
    [
        ("12_3", [3]),
        ("12_[0-2,7%2]", [0, 1, 2, 7]),
        ("12_[1-9:4]", [1, 5, 9]),
        ("12_[0-1,...]", [0, 1]),
    ],
)
def test_tasks_that_wait_together_are_named(job_id, tasks):
    assert list(tasks_in(job_id)) == tasks
