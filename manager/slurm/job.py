"""One Slurm job as it is at one moment, and its states in words.

Pure: knows Slurm's states and reasons by name, asks nobody. What Slurm's commands print is read in
`manager.slurm.listings`, and they are called in `manager.slurm.jobs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# A job in one of these does not leave it; a requeued one is PENDING again.
OVER: Final = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
WAITING: Final = frozenset(
    {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
FORGOTTEN: Final = "UNKNOWN"  # ended long ago, and Slurm keeps no account of it

# Slurm's reason -> what it means to who waits. {job} and the fields below are filled in.
REASONS: Final = {
    "None": "the scheduler has not looked at it yet",
    "Resources": "as soon as enough nodes are free, it starts",
    "Priority": "other jobs go first",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job that it depends on did not end as it should, so it "
    "never starts: cancel it",
    "BeginTime": "it may not start before its begin time; a requeued job waits two minutes",
    "JobHeldUser": "you hold it: `scontrol release {id}` lets it go",
    "JobHeldAdmin": "the cluster's administrators hold it",
    "PartitionNodeLimit": "it asks for {num_nodes} nodes, more than partition {partition} has or "
    "gives to a job: cancel it and ask for fewer",
    "PartitionTimeLimit": "it asks for more time than partition {partition} gives: cancel it and "
    "ask for less",
    "PartitionConfig": "it asks for more than partition {partition} can give: cancel it and ask "
    "for less",
    "PartitionDown": "partition {partition} is closed: nothing starts there now",
    "PartitionInactive": "partition {partition} is closed: nothing starts there now",
    "BadConstraints": "no node has what it asks for: cancel it and ask for less",
    "ReqNodeNotAvail": "the nodes that it needs are down, drained or reserved",
    "NodeDown": "a node that it needs is down",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation is gone: cancel it",
    "Licenses": "the licenses that it asks for are in use",
    "JobArrayTaskLimit": "as many tasks of the array run as it allows at once",
    "InvalidAccount": "its account is not valid here: cancel it and pass another --account",
    "InvalidQOS": "its quality of service is not valid here: cancel it and pass another --qos",
    "Cleaning": "its earlier run is being cleared away",
    "Prolog": "its nodes are being made ready",
    "JobLaunchFailure": "it could not be started on its nodes",
    "launch failed requeued held": "it could not be started on its nodes and is held: look at "
    "the cluster's nodes, then `scontrol release {id}`",
}
# By how Slurm's reason begins, for the families of limits.
FAMILIES: Final = (
    ("ReqNodeNotAvail", REASONS["ReqNodeNotAvail"]),
    ("QOSMax", "it asks for more than its quality of service gives, or others of yours use it up"),
    ("QOSMin", "it asks for less than its quality of service wants"),
    ("QOSGrp", "the limit of its quality of service is used up"),
    ("QOS", "a limit of its quality of service holds it"),
    ("AssocGrp", "the limit of your account is used up"),
    ("AssocMax", "it asks for more than your account gives, or others of yours use it up"),
    ("Assoc", "a limit of your account holds it"),
    ("MaxMemPerLimit", "it asks for more memory than partition {partition} gives: cancel it"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What Slurm said of one job, or of one task of an array."""

    id: str  # "123"; "123_4" is task 4 of an array, "123_[5-9]" tasks that wait together
    raw_id: str  # the same but for tasks of an array, each of which has a number of its own too
    name: str
    user: str
    partition: str
    state: str  # one word, as in OVER and WAITING: no "by 0" after CANCELLED
    reason: str  # why it waits, in Slurm's words, or "None"
    num_nodes: int
    nodes: str  # "node[1-3]"; empty while it has none
    elapsed_s: int | None
    limit_s: int | None  # None: no limit, or not known
    submitted_at: float | None = None  # unix seconds, as are the next two
    started_at: float | None = None
    ended_at: float | None = None
    # As shells have it: 128 + N if signal N ended it. None while it is not over, or not known.
    exit_code: int | None = None
    log: str | None = None  # the file of its standard output, where that is known

    @property
    def is_over(self) -> bool:
        return is_over(self.state)

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING

    @property
    def number(self) -> str:
        """The id without the task: what sbatch printed."""
        return re.split("[_+]", self.id, maxsplit=1)[0]

    @property
    def place(self) -> tuple[int, int]:
        """For sorting: by number, then by task."""
        return int(self.number), next(tasks_in(self.id), -1) if self.id != self.number else -1

    def answers_to(self, asked: str) -> bool:
        """Whether somebody who asks for this id means this job."""
        if asked in (self.id, self.raw_id, self.number):
            return True
        number, _, task = asked.partition("_")
        return number == self.number and task.isdigit() and int(task) in set(tasks_in(self.id))


def tasks_in(job_id: str) -> Iterator[int]:
    """The tasks in "12_[0-2,7%2]"; Slurm cuts a long list short, and the rest is missing then."""
    listed = re.split("[_+]", job_id, maxsplit=1)[-1].strip("[]").partition("%")[0]
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", listed):
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def is_over(state: str) -> bool:
    """Whether a job in this state has ended."""
    return plain_state(state) in OVER or state == FORGOTTEN


def plain_state(text: str) -> str:
    """ "CANCELLED by 1000", "COMPLETED+" or "FAILED:REQUEUE" as one word."""
    words = re.split(r"[\s+:,]", text.strip(), maxsplit=1)
    return words[0].upper()


def why_it_waits(job: Job) -> str:
    """One clause on why a job has not started, with Slurm's own reason in front."""
    reason = job.reason.replace("_", " ")
    meaning = REASONS.get(reason) or next(
        (words for start, words in FAMILIES if reason.startswith(start)), None
    )
    if meaning is None:
        return reason
    words = meaning.format(id=job.id, num_nodes=job.num_nodes, partition=job.partition)
    return words if reason == "None" else f"{reason}: {words}"


def how_it_ended(state: str, exit_code: int | None = None, *, limit_s: int | None = None) -> str:
    """One clause on a job that is over, to stand behind "job 12"."""
    state = plain_state(state)
    match state:
        case "COMPLETED":
            return "completed"
        case "FAILED" if exit_code is not None and exit_code > 128:
            return f"failed: signal {exit_code - 128} ended it"
        case "FAILED":
            return f"failed with exit code {exit_code}" if exit_code else "failed"
        case "CANCELLED":
            return "was cancelled"
        case "TIMEOUT":
            limit = f" of {clock(limit_s)}" if limit_s else ""
            return f"reached its time limit{limit}: submit it with a longer --time"
        case "NODE_FAIL":
            return "lost a node: the node failed, or the network to it"
        case "OUT_OF_MEMORY":
            return "ran out of memory: ask for more --mem, or for more nodes"
        case "PREEMPTED":
            return "was preempted by another job"
        case "DEADLINE":
            return "could not end before its deadline"
        case "BOOT_FAIL":
            return "ended because its nodes could not be booted"
        case "UNKNOWN":
            return "is not known to Slurm any more, nor how it ended"
    return f"ended in state {state}"


def clock(seconds: float | None) -> str:
    """Seconds as Slurm writes them: 0:05, 1:00:00, 2-03:00:00; "-" where there are none."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
