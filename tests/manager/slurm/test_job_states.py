"""States and reasons of Slurm in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manager.slurm.job import (
    REASONS,
    Job,
    clock,
    how_it_ended,
    is_over,
    plain_state,
    why_it_waits,
)
from manager.slurm.lookup import overall

WAITING = Job(
    id="12",
    raw_id="12",
    name="train",
    user="ana",
    partition="gpu",
    state="PENDING",
    reason="Resources",
    num_nodes=8,
    nodes="",
    elapsed_s=0,
    limit_s=None,
)


@pytest.mark.parametrize(
    ("written", "state"),
    [
        ("CANCELLED by 0", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("COMPLETED", "COMPLETED"),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("running", "RUNNING"),
    ],
)
def test_a_state_is_one_word(written, state):
    assert plain_state(written) == state


def test_a_job_that_is_completing_or_requeued_is_not_over():
    for state in ("COMPLETING", "PENDING", "REQUEUED", "RUNNING", "SUSPENDED", "CONFIGURING"):
        assert not is_over(state)
    for state in ("COMPLETED", "CANCELLED by 7", "NODE_FAIL", "TIMEOUT", "PREEMPTED"):
        assert is_over(state)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_that_is_known_makes_a_clause(reason):
    said = why_it_waits(replace(WAITING, reason=reason))
    assert "{" not in said and not said.endswith(".")
    assert said.startswith(f"{reason}: ") or reason == "None"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "PartitionNodeLimit",
            "PartitionNodeLimit: it asks for 8 nodes, more than partition gpu has or gives to a "
            "job: cancel it and ask for fewer",
        ),
        (
            "ReqNodeNotAvail, UnavailableNodes:node3",
            "ReqNodeNotAvail, UnavailableNodes:node3: the nodes that it needs are down, drained "
            "or reserved",
        ),
        ("AssocGrpGRES", "AssocGrpGRES: the limit of your account is used up"),
        ("JobHeldUser", "JobHeldUser: you hold it: `scontrol release 12` lets it go"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_a_reason_is_said_in_words_behind_slurms_own(reason, said):
    assert why_it_waits(replace(WAITING, reason=reason)) == said


@pytest.mark.parametrize(
    ("state", "exit_code", "said"),
    [
        ("COMPLETED", 0, "completed"),
        ("FAILED", 3, "failed with exit code 3"),
        ("FAILED", 137, "failed: signal 9 ended it"),
        ("FAILED", None, "failed"),
        ("CANCELLED by 0", None, "was cancelled"),
        ("TIMEOUT", None, "reached its time limit: submit it with a longer --time"),
        ("NODE_FAIL", None, "lost a node: the node failed, or the network to it"),
        ("OUT_OF_MEMORY", 137, "ran out of memory: ask for more --mem, or for more nodes"),
        ("PREEMPTED", None, "was preempted by another job"),
        ("DEADLINE", None, "could not end before its deadline"),
        ("BOOT_FAIL", None, "ended because its nodes could not be booted"),
        ("REVOKED", None, "ended in state REVOKED"),
    ],
)
def test_how_a_job_ended_is_a_clause(state, exit_code, said):
    assert how_it_ended(state, exit_code) == said


def test_a_time_limit_is_told_where_it_is_known():
    assert how_it_ended("TIMEOUT", limit_s=5400).startswith("reached its time limit of 1:30:00:")


def test_spans_of_time_are_written_as_slurm_does():
    assert [clock(it) for it in (None, 5, 3600, 183600)] == ["-", "0:05", "1:00:00", "2-03:00:00"]


def test_a_task_answers_to_the_array_to_its_task_and_to_its_own_number():
    task = replace(WAITING, id="12_3", raw_id="17")
    assert all(task.answers_to(it) for it in ("12", "12_3", "17"))
    assert not any(task.answers_to(it) for it in ("1", "12_4", "3", "13"))
    together = replace(WAITING, id="12_[3-5]")
    assert together.answers_to("12_4") and not together.answers_to("12_6")


def test_the_task_that_says_most_stands_for_an_array():
    done, failed = replace(WAITING, state="COMPLETED"), replace(WAITING, state="FAILED")
    running = replace(WAITING, state="RUNNING")
    assert overall([done, failed, WAITING, running]) is running
    assert overall([done, failed, WAITING]) is WAITING
    assert overall([done, failed, done]) is failed
    assert overall([done]) is done
