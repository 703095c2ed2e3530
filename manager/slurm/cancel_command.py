"""`manager cancel`: end jobs, by id or by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from manager.cli import say
from manager.slurm.client import SlurmRefused, run_slurm
from manager.slurm.job import Job, clock, how_it_ended
from manager.slurm.jobs import JOB_ID
from manager.slurm.lookup import Found, JobBook, printable
from proto.errors import JobError, UsageError

# In the folder of a job that serves: the first task writes one and looks for the other.
SERVING_FILE: Final = "serving.json"
DRAIN_FILE: Final = "drain"


@click.command()
@click.argument("jobs", nargs=-1, metavar="JOB...")
@click.option("--name", metavar="NAME", help="End all my jobs with this name instead.")
def cancel(jobs: tuple[str, ...], name: str | None) -> None:
    """End jobs. JOB is an id as `manager jobs` shows it.

    A job that serves finishes the requests that run first.
    """
    if bool(jobs) == (name is not None):
        raise UsageError("say which job to cancel: `manager cancel JOB`, or --name NAME.")
    book = JobBook.default(say)
    for found in _by_name(book, name) if name is not None else _by_id(book, jobs):
        click.echo(end(found))


def end(found: Found) -> str:
    """Cancel a job unless it is over; a sentence on what was done.

    Raises:
        JobError: Slurm will not.
    """
    if found.job.is_over:
        return f"{found.title} was over already: it {_how(found.job)}."
    if told_to_drain(found):
        return (
            f"told {found.title} to finish the requests that run, and to end; cancel it once more "
            "to end it at once."
        )
    try:
        run_slurm(["scancel", found.job_id], environ=os.environ)
    except SlurmRefused as exc:
        if "already completing or completed" in exc.said:
            return f"{found.title} was just ending by itself."
        raise JobError(f"{found.title} was not cancelled: {exc.said}.") from exc
    return f"cancelled {found.title}, which {_what_it_did(found.jobs)}."


def told_to_drain(found: Found) -> bool:
    """Ask a job that serves to end by itself; False: it does not serve, or was asked before."""
    if found.record is None or found.job.is_waiting:
        return False
    folder = Path(found.record.folder)
    told = folder / DRAIN_FILE
    try:
        if not (folder / SERVING_FILE).is_file() or told.exists():
            return False
        told.touch()
    except OSError:
        return False
    return True


def _by_id(book: JobBook, jobs: Sequence[str]) -> list[Found]:
    for job in jobs:
        if not JOB_ID.fullmatch(job):
            raise UsageError(
                f"{printable(job)!r} is not the id of a job, which is a number: to cancel by "
                "name, pass --name."
            )
    return [book.find(job) for job in dict.fromkeys(jobs)]


def _by_name(book: JobBook, name: str) -> list[Found]:
    named = book.named(name)
    return [found for found in named if not found.job.is_over] or named[-1:]


def _how(job: Job) -> str:
    return how_it_ended(job.state, job.exit_code, limit_s=job.limit_s)


def _what_it_did(jobs: Sequence[Job]) -> str:
    live = [job for job in jobs if not job.is_over]
    running = [job for job in live if not job.is_waiting]
    if not running:
        return "had not started"
    nodes = ", ".join(dict.fromkeys(job.nodes for job in running if job.nodes))
    elapsed_s = max((job.elapsed_s or 0 for job in running), default=0)
    return f"had run for {clock(elapsed_s)}" + (f" on {nodes}" if nodes else "")
