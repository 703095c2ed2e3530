"""Ask Slurm about jobs: one poll for all of them.

squeue knows those that live and, for some minutes, those that ended; scontrol adds how these ended;
sacct knows all, where the cluster keeps accounts. Who remembers a job that none of them knows is
`manager.slurm.records`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from manager.slurm.client import SlurmRefused, run_slurm
from manager.slurm.job import FORGOTTEN, Job, is_over
from manager.slurm.listings import (
    ACCOUNT_FIELDS,
    QUEUE_FORMAT,
    UNIT,
    parse_accounts,
    parse_pages,
    parse_queue,
)
from proto.errors import Error

__all__ = ["JOB_ID", "Job", "Jobs", "is_over", "poll", "poll_mine"]

# A job, one task of an array, or one component of a heterogeneous job.
JOB_ID: Final = re.compile(r"\d+(?:[_+]\d+)?")

# Ended jobs whose pages are asked for one by one; for more, all of the cluster come at once.
FEW: Final = 8


@dataclass(frozen=True, slots=True)
class Jobs:
    """The answer to one poll."""

    jobs: tuple[Job, ...]

    def of(self, asked: str) -> tuple[Job, ...]:
        """The job with this id, or the tasks of this array; none where Slurm knows nothing."""
        found = (job for job in self.jobs if job.answers_to(asked))
        return tuple(sorted(found, key=lambda job: job.place))


def poll(ids: Collection[str], *, environ: Mapping[str, str] | None = None) -> Jobs:
    """What Slurm knows of these jobs, whoever submitted them.

    Args:
        ids: each matches `JOB_ID`.
    Raises:
        Error: the controller did not answer, or there is no Slurm here.
    """
    asked = sorted(set(ids))
    if not asked:
        return Jobs(())
    found = _queue(["--jobs", ",".join(asked)], environ)
    return Jobs(tuple(_complete(found, asked, environ)))


def poll_mine(also: Collection[str] = (), *, environ: Mapping[str, str] | None = None) -> Jobs:
    """All jobs of this user that Slurm knows without its accounts, and those with ids `also`.

    Raises:
        Error: as for `poll`.
    """
    found = _queue(["--user", str(os.getuid())], environ)
    return Jobs(tuple(_complete(found, sorted(set(also)), environ)))


def _queue(choice: Sequence[str], environ: Mapping[str, str] | None) -> list[Job]:
    words = ["squeue", "--noheader", "--states=all", "--format", QUEUE_FORMAT, *choice]
    try:
        return parse_queue(run_slurm(words, environ=environ))
    except SlurmRefused as exc:
        if "invalid job id" in exc.said.lower():  # it says so where it knows none of them
            return []
        raise


def _complete(
    queued: Sequence[Job], asked: Sequence[str], environ: Mapping[str, str] | None
) -> Iterable[Job]:
    """Add exit codes, and jobs that squeue has forgotten."""
    pages = _pages([job for job in queued if job.is_over], environ)
    for job in queued:
        page = pages.get(job.id)
        # It may have been requeued between the two questions: the later answer counts.
        yield page if page is not None else job
    missing = [it for it in asked if not any(job.answers_to(it) for job in queued)]
    if missing:
        yield from _accounts(missing, environ)


def _pages(jobs: Sequence[Job], environ: Mapping[str, str] | None) -> dict[str, Job]:
    numbers = sorted({job.raw_id for job in jobs})
    questions = [[number] for number in numbers] if len(numbers) <= FEW else [[]]
    pages: dict[str, Job] = {}
    for words in questions:
        try:
            said = run_slurm(["scontrol", "show", "job", *words], environ=environ)
        except SlurmRefused:
            continue  # forgotten just now
        pages |= {page.id: page for page in parse_pages(said)}
    return pages


def _accounts(ids: Sequence[str], environ: Mapping[str, str] | None) -> list[Job]:
    """What the accounts say; nothing where there are none, or nobody answers for them."""
    words = ["sacct", "--noheader", "--allocations", "--starttime=1970-01-01", "--parsable2"]
    form = [f"--delimiter={UNIT}", f"--format={','.join(ACCOUNT_FIELDS)}"]
    try:
        said = run_slurm([*words, *form, "--jobs", ",".join(ids)], environ=environ)
    except Error:
        return []
    jobs = parse_accounts(said)
    # The controller has forgotten it, so it does not run: the accounts missed its end.
    return [job if job.is_over else replace(job, state=FORGOTTEN) for job in jobs]
