"""Find the job that somebody means: by id or by name, in Slurm's memory or in our records.

Joins `manager.slurm.jobs` and `manager.slurm.records`, and notes in the records how jobs ended.
Prints nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from manager.slurm.client import cluster_name
from manager.slurm.job import FORGOTTEN, Job
from manager.slurm.jobs import JOB_ID, poll, poll_mine
from manager.slurm.records import JobRecord, Records
from proto.errors import JobError, UsageError


@dataclass(frozen=True, slots=True)
class Found:
    """A job that somebody asked for."""

    job_id: str  # to poll it by
    record: JobRecord | None  # None: it was not submitted from here
    jobs: tuple[Job, ...]  # one, or the tasks of an array

    @property
    def job(self) -> Job:
        """The job, or the task that says most of the whole array."""
        return overall(self.jobs)

    @property
    def title(self) -> str:
        """For sentences: "job 12 (train)"."""
        return f"job {self.job_id} ({printable(self.job.name)})"


@dataclass(slots=True)
class JobBook:
    """Slurm's jobs and our records together, on one cluster."""

    records: Records
    environ: Mapping[str, str]
    remark: Callable[[str], None] = lambda _: None  # hears what does not stop the work
    _cluster: str | None = field(default=None, init=False)

    @classmethod
    def default(cls, remark: Callable[[str], None]) -> JobBook:
        """Of this process's user and environment."""
        return cls(Records.default(os.environ), os.environ, remark)

    def find(self, asked: str) -> Found:
        """The job with this id, or my latest with this name.

        Raises:
            UsageError: there is none.
            JobError: Slurm or the records cannot be asked.
        """
        return self._find_id(asked) if JOB_ID.fullmatch(asked) else self.named(asked)[-1]

    def named(self, name: str) -> list[Found]:
        """All of mine with this name, older ones first; those that live last.

        Raises:
            UsageError: there is none.
            JobError: Slurm or the records cannot be asked.
        """
        records = {it.job_id: it for it in self.recorded()}
        ids = [it.job_id for it in records.values() if it.name == name]
        mine = poll_mine(_unsettled(records, ids), environ=self.environ)
        live = {job.number for job in mine.jobs if job.name == name}
        found = [
            self._found(job_id, records.get(job_id), mine.of(job_id))
            for job_id in sorted({*ids, *live}, key=int)
        ]
        if not found:
            raise UsageError(self._no_name(name))
        return sorted(found, key=lambda it: not it.job.is_over)

    def recorded(self) -> tuple[JobRecord, ...]:
        """The records of this cluster, older ones first."""
        if not self.records.all():
            return ()  # no need to ask for the cluster's name
        return self.records.all(self.cluster())

    def cluster(self) -> str:
        """The cluster's name."""
        if self._cluster is None:
            self._cluster = cluster_name(self.environ)
        return self._cluster

    def settle(self, record: JobRecord, jobs: Sequence[Job]) -> None:
        """Note how a job ended, once it has; a record that cannot be written is remarked on."""
        if not jobs or not all(job.is_over for job in jobs):
            return
        job = overall(jobs)
        if job.state in (FORGOTTEN, record.state):
            return
        end = job.state, job.exit_code, job.ended_at
        try:
            self.records.settle(record.job_id, *end, cluster=record.cluster)
        except JobError as exc:
            self.remark(str(exc))

    def _find_id(self, asked: str) -> Found:
        records = {it.job_id: it for it in self.recorded()}
        record = records.get(asked) or records.get(asked.partition("_")[0])
        jobs = poll([asked], environ=self.environ).of(asked)
        if not jobs and record is None:
            raise UsageError(
                f"there is no job {asked} on cluster {self.cluster()}, or it ended so long ago "
                "that Slurm has forgotten it: `manager jobs` lists yours."
            )
        return self._found(asked, record, jobs)

    def _found(self, job_id: str, record: JobRecord | None, jobs: tuple[Job, ...]) -> Found:
        if record is None or (jobs and not is_recorded(jobs[0], record)):
            return Found(job_id, None, jobs)
        if record.job_id == job_id:
            self.settle(record, jobs)
        return Found(job_id, record, jobs or (job_of(record),))

    def _no_name(self, name: str) -> str:
        names = {it.name for it in self.recorded()}
        names |= {job.name for job in poll_mine(environ=self.environ).jobs}
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`manager jobs` lists yours."
        return f"you have no job named {name!r} on cluster {self.cluster()}: {hint}"


def job_of(record: JobRecord) -> Job:
    """What a record says, as a job that is over."""
    return Job(
        id=record.job_id,
        raw_id=record.job_id,
        name=record.name,
        user="",
        partition="",
        state=record.state or FORGOTTEN,
        reason="None",
        num_nodes=0,
        nodes="",
        elapsed_s=None,
        limit_s=None,
        submitted_at=record.submitted_at,
        ended_at=record.ended_at,
        exit_code=record.exit_code,
    )


def is_recorded(job: Job, record: JobRecord) -> bool:
    """Whether this is the job of that record, and no later one with its number.

    A controller that lost its state counts from 1 again.
    """
    if record.ended_at is None or job.submitted_at is None:
        return True
    return job.submitted_at <= record.ended_at


def overall(jobs: Sequence[Job]) -> Job:
    """Of the tasks of an array, the one that stands for all: it runs, waits, failed, or is last."""
    running = (job for job in jobs if not job.is_over and not job.is_waiting)
    waiting = (job for job in jobs if job.is_waiting)
    failed = (job for job in jobs if job.state != "COMPLETED")
    return next(running, None) or next(waiting, None) or next(failed, None) or jobs[-1]


def printable(text: str) -> str:
    """A name without line ends and other characters that a terminal would obey."""
    return "".join(it if it.isprintable() else "?" for it in text)


def _unsettled(records: Mapping[str, JobRecord], ids: Sequence[str]) -> list[str]:
    return [it for it in ids if records[it].state is None]
