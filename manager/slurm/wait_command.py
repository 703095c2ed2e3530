"""`manager wait`: until a job is over; its exit code says whether all went well."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import click

from manager import event_loop
from manager.cli import say
from manager.output import Notices
from manager.slurm.job import Job, clock, how_it_ended, why_it_waits
from manager.slurm.log_file import find_log, last_words
from manager.slurm.lookup import Found, JobBook, overall
from manager.slurm.watch import watch
from proto.errors import Error, JobError


@click.command()
@click.argument("job", metavar="JOB")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Give up waiting after so long; the job goes on.",
)
def wait(job: str, timeout: float | None) -> None:
    """Wait until a job is over; exit code 0 if it completed. JOB is an id, or a name."""
    event_loop.run(wait_for(job, timeout_s=timeout))


async def wait_for(job: str, *, timeout_s: float | None) -> None:
    """Wait for the job's end, and say how it came.

    Raises:
        UsageError: there is no such job.
        JobError: it did not complete, or not in time.
    """
    book = JobBook.default(say)
    found = await event_loop.in_background(book.find, job)
    waiting = _Waiting(found)
    try:
        async with asyncio.timeout(timeout_s):
            await waiting.run()
    except TimeoutError as exc:
        raise JobError(
            f"{found.title} is {_now(waiting.jobs)} after {timeout_s:g} s (--timeout): it goes "
            "on; `manager cancel` ends it."
        ) from exc
    finally:
        waiting.notices.clear()
    if found.record is not None:
        book.settle(found.record, waiting.jobs)
    job_now = overall(waiting.jobs)
    if job_now.state != "COMPLETED":
        raise JobError(await event_loop.in_background(_what_went_wrong, found, waiting.jobs))
    nodes = f" on {job_now.nodes}" if job_now.nodes else ""
    click.echo(f"{found.title} completed in {clock(job_now.elapsed_s)}{nodes}")


class _Waiting:
    """Shows how a job does until it is over."""

    def __init__(self, found: Found) -> None:
        self.jobs = found.jobs
        self.notices = Notices()
        self._found = found
        self._said = ""

    async def run(self) -> None:
        async for jobs in watch(self._found, self._remark):
            self.jobs, job = jobs, overall(jobs)
            self.notices.show(f"{self._found.title}: {_now(jobs)}")
            if job.is_waiting:
                self._remark(f"{self._found.title} waits: {why_it_waits(job)}")

    def _remark(self, text: str) -> None:
        if text != self._said:
            self.notices.say(f"manager: {text}")
        self._said = text


def _now(jobs: Sequence[Job]) -> str:
    """The state of a job in a few words, or of an array."""
    job = overall(jobs)
    parts = [job.state]
    if job.nodes:
        parts.append(f"on {job.nodes}")
    if not job.is_waiting and job.elapsed_s is not None:
        parts.append(f"for {clock(job.elapsed_s)}")
    if len(jobs) > 1:
        parts.append(f"({sum(it.is_over for it in jobs)} tasks are over)")
    return " ".join(parts)


def _what_went_wrong(found: Found, jobs: Sequence[Job]) -> str:
    job = overall(jobs)
    name = found.title
    if len(jobs) > 1:
        failed = sum(it.state != "COMPLETED" for it in jobs)
        name = (
            f"task {job.id} of {found.title}, and {failed - 1} more,"
            if failed > 1
            else (f"task {job.id} of {found.title}")
        )
    sentence = f"{name} {how_it_ended(job.state, job.exit_code, limit_s=job.limit_s)}"
    words = _words_of_log(found, job)
    return f"{sentence}. It said last: {words}" if words else f"{sentence}."


def _words_of_log(found: Found, job: Job) -> str | None:
    """Why it failed, by its own account; a job that was stopped has nothing to add."""
    if job.state in ("CANCELLED", "TIMEOUT", "PREEMPTED"):
        return None
    try:
        path = find_log(Found(job.id, found.record, (job,)), os.environ)
    except Error:
        return None
    return last_words(path)
