"""`manager logs`: what a job printed, and, with `--follow`, what it prints until it is over."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Final

import click

from manager import event_loop
from manager.cli import say
from manager.output import Notices
from manager.slurm.job import Job, how_it_ended, why_it_waits
from manager.slurm.log_file import GrowingFile, find_log
from manager.slurm.lookup import Found, JobBook, overall
from manager.slurm.watch import watch
from proto.errors import JobError

LOOK_EVERY_S: Final = 0.25

# A shared file system may show the last lines, or the file itself, some time after the job's end.
QUIET_S: Final = 1.0
LAG_S: Final = 4.0


@click.command()
@click.argument("job", metavar="JOB")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is over. Ctrl-C leaves it.")
@click.option(
    "--lines", type=click.IntRange(min=0), metavar="N", help="Begin with the last N lines only."
)
def logs(job: str, follow: bool, lines: int | None) -> None:
    """Show what a job printed. JOB is an id, or a name: then the latest with it."""
    event_loop.run(show(job, follow=follow, num_lines=lines))


async def show(job: str, *, follow: bool, num_lines: int | None) -> None:
    """Copy the job's log to stdout.

    Raises:
        Error: there is no such job, or no log of it.
    """
    book = JobBook.default(say)
    found = await event_loop.in_background(book.find, job)
    file = GrowingFile(await event_loop.in_background(find_log, found, os.environ))
    if num_lines is not None:
        file.skip_to_last(num_lines)
    if follow:
        await _Follower(found, file, book).run()
        return
    if not await _copy(file) and not file.exists():
        raise JobError(_why_no_log(found, file, found.job))


class _Follower:
    """Prints a log until its job is over, while another task asks Slurm how the job does."""

    def __init__(self, found: Found, file: GrowingFile, book: JobBook) -> None:
        self._found, self._file, self._book = found, file, book
        self._notices = Notices()
        self._said = ""
        self._has_read = False
        self._jobs = found.jobs

    async def run(self) -> None:
        watcher = asyncio.create_task(self._watch())
        try:
            while not watcher.done():
                await self._read()
                await asyncio.wait([watcher], timeout=LOOK_EVERY_S)
            await watcher
        finally:
            watcher.cancel()
        await self._read_the_rest()
        if self._found.record is not None:
            self._book.settle(self._found.record, self._jobs)
        if not self._has_read and not self._file.exists():
            raise JobError(_why_no_log(self._found, self._file, overall(self._jobs)))
        self._remark(f"{self._found.title} {_how(overall(self._jobs))}")

    async def _watch(self) -> None:
        async for jobs in watch(self._found, self._remark):
            self._jobs, job = jobs, overall(jobs)
            if job.is_waiting:
                self._remark(f"{self._found.title} waits: {why_it_waits(job)}")

    async def _read(self) -> None:
        began_anew = self._file.began_anew
        if await _copy(self._file):
            self._has_read = True
        if self._file.began_anew > began_anew:
            self._remark(f"{self._found.title} was requeued; its log begins anew")

    async def _read_the_rest(self) -> None:
        """Until nothing has come for a while; a file system that lags gets longer."""
        quiet_s = 0.0
        while quiet_s < (QUIET_S if self._has_read or self._never_began() else LAG_S):
            quiet_s = 0.0 if await _copy(self._file) else quiet_s + LOOK_EVERY_S
            self._has_read = self._has_read or quiet_s == 0.0
            await asyncio.sleep(LOOK_EVERY_S)

    def _never_began(self) -> bool:
        return all(not job.nodes for job in self._jobs)

    def _remark(self, text: str) -> None:
        if text != self._said:
            self._notices.say(f"manager: {text}")
        self._said = text


async def _copy(file: GrowingFile) -> bool:
    """Print all that there is to read now; whether there was anything."""
    has_copied = False
    while await event_loop.in_background(_copy_a_piece, file):
        has_copied = True
    return has_copied


def _copy_a_piece(file: GrowingFile) -> bool:
    piece = file.read()
    if piece:
        sys.stdout.buffer.write(piece)  # bytes as they are: a log may be in any encoding
        sys.stdout.buffer.flush()
    return bool(piece)


def _why_no_log(found: Found, file: GrowingFile, job: Job) -> str:
    if job.is_waiting:
        return (
            f"{found.title} has not started, so it has no log yet ({why_it_waits(job)}): pass -f "
            "to wait for it."
        )
    if not job.is_over:
        return (
            f"{found.title} runs, but there is no log at {file.path}: pass -f to wait for it, or "
            "look from a machine that shares that folder with the nodes."
        )
    return (
        f"{found.title} {_how(job)} and left no log at {file.path}, or this machine does not "
        "share that folder with the nodes."
    )


def _how(job: Job) -> str:
    return how_it_ended(job.state, job.exit_code, limit_s=job.limit_s)
