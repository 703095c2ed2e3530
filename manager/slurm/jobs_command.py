"""`manager jobs`: what I have on the cluster, what it waits for, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from manager.cli import say
from manager.slurm.job import Job, clock, how_it_ended, why_it_waits
from manager.slurm.jobs import poll_mine
from manager.slurm.lookup import JobBook, is_recorded, job_of, printable
from manager.slurm.records import JobRecord
from manager.tables import table

TITLES: Final = ("JOB", "NAME", "BACKEND", "STATE", "NODES", "ELAPSED", "REMARK")

# Without --all: the ended ones that somebody may still ask about.
RECENT: Final = 20


@dataclass(frozen=True, slots=True)
class JobView:
    """A job, and its record where it was submitted from here."""

    job: Job
    record: JobRecord | None

    @property
    def remark(self) -> str:
        """Why it waits, or how it ended."""
        if self.job.is_waiting:
            return why_it_waits(self.job)
        if self.job.is_over:
            return how_it_ended(self.job.state, self.job.exit_code, limit_s=self.job.limit_s)
        return ""

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        job = self.job
        return (
            job.id,
            printable(job.name),
            self.record.backend if self.record else "-",
            job.state,
            job.nodes or (str(job.num_nodes) if job.num_nodes else "-"),
            clock(job.elapsed_s),
            self.remark,
        )

    def as_json(self) -> dict[str, Any]:
        """Everything that is known."""
        job, record = self.job, self.record
        return {
            "id": job.id,
            "name": job.name,
            "backend": record.backend if record else None,
            "state": job.state,
            "is_over": job.is_over,
            "reason": job.reason if job.is_waiting else None,
            "remark": self.remark,
            "user": job.user or None,
            "partition": job.partition or None,
            "num_nodes": job.num_nodes or None,
            "nodes": job.nodes or None,
            "elapsed_s": job.elapsed_s,
            "limit_s": job.limit_s,
            "exit_code": job.exit_code if job.is_over else None,
            "submitted_at": record.submitted_at if record else job.submitted_at,
            "started_at": job.started_at,
            "ended_at": job.ended_at if job.is_over else None,
            "folder": record.folder if record else None,
            "log": job.log or (record.log if record else None),
            "command": list(record.command) if record else None,
        }


@click.command()
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help=f"Also ended jobs that were not submitted from here, and more than {RECENT} that were.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def jobs(everything: bool, as_json: bool) -> None:
    """Show my jobs: state, nodes, why they wait, how they ended."""
    views = my_jobs(JobBook.default(say), everything=everything)
    if as_json:
        click.echo(json.dumps([view.as_json() for view in views], ensure_ascii=False))
    elif views:
        click.echo(table(TITLES, [view.cells() for view in views]))
    else:
        click.echo("You have no jobs on this cluster, and none was submitted from here.")


def my_jobs(book: JobBook, *, everything: bool) -> list[JobView]:
    """What Slurm knows of this user's jobs and what is recorded, older ones first.

    Raises:
        Error: Slurm or the records cannot be asked.
    """
    records = {record.job_id: record for record in book.recorded()}
    unsettled = [record.job_id for record in records.values() if record.state is None]
    known = poll_mine(unsettled, environ=book.environ).jobs
    views = [JobView(job, _record_of(job, records)) for job in known]
    for record in records.values():
        book.settle(record, [it.job for it in views if it.record is record])
    seen = {view.record.job_id for view in views if view.record}
    views += [JobView(job_of(it), it) for it in records.values() if it.job_id not in seen]
    return sorted(views if everything else _recent(views), key=_age)


def _record_of(job: Job, records: dict[str, JobRecord]) -> JobRecord | None:
    record = records.get(job.number)
    return record if record is not None and is_recorded(job, record) else None


def _recent(views: Sequence[JobView]) -> Iterable[JobView]:
    live = [view for view in views if not view.job.is_over]
    over = sorted((it for it in views if it.job.is_over and it.record), key=_age)
    return [*over[-RECENT:], *live]


def _age(view: JobView) -> tuple[bool, float, tuple[int, int]]:
    """Ended ones first, then by submission."""
    job, record = view.job, view.record
    submitted = record.submitted_at if record else job.submitted_at
    return not job.is_over, submitted or 0.0, job.place
