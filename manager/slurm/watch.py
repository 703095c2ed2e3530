"""Follow one job until it is over, by asking Slurm every few seconds.

A controller that is silent for some minutes (a restart, a full queue) ends no watch. Prints nothing
itself; who watches says what there is to say.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Final

from manager import event_loop
from manager.slurm.job import FORGOTTEN, Job, clock
from manager.slurm.jobs import poll
from manager.slurm.lookup import Found
from proto.errors import JobError

# The first answers come soon, so that a short job ends a short wait; later ones cost a busy
# controller one question in five seconds.
FIRST_PAUSE_S: Final = 0.5
PAUSE_S: Final = 5.0

# A controller's restart takes seconds, its move to the backup two minutes.
PATIENCE_S: Final = 600.0


async def watch(found: Found, remark: Callable[[str], None]) -> AsyncIterator[tuple[Job, ...]]:
    """The job, or the tasks of the array, as they are now; again and again until all are over.

    Raises:
        JobError: nobody answered for `PATIENCE_S`.
    """
    tasks = {job.id: job for job in found.jobs}
    pause_s = FIRST_PAUSE_S
    heard_s, is_silent = time.monotonic(), False
    while True:
        yield tuple(sorted(tasks.values(), key=lambda job: job.place))
        if all(job.is_over for job in tasks.values()):
            return
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, PAUSE_S)
        try:
            tasks = await event_loop.in_background(_poll_again, found.job_id, tasks)
        except JobError as exc:
            if time.monotonic() - heard_s > PATIENCE_S:
                raise
            if not is_silent:
                remark(f"{exc} (trying on for {clock(PATIENCE_S)})")
            is_silent = True
            continue
        heard_s, is_silent = time.monotonic(), False


def _poll_again(asked: str, before: dict[str, Job]) -> dict[str, Job]:
    """The tasks as they are now; those that Slurm has dropped since as the accounts have them."""
    now = {job.id: job for job in poll([asked], environ=os.environ).of(asked)}
    if not now:
        return {it.id: it if it.is_over else _forgotten(it) for it in before.values()}
    # Tasks that wait together are one line, whose id changes as they start.
    gone = [it for it in before.values() if it.id not in now and "[" not in it.id]
    accounts = poll([it.id for it in gone if not it.is_over], environ=os.environ)
    for job in gone:
        known = () if job.is_over else accounts.of(job.id)
        now[job.id] = known[0] if known else job if job.is_over else _forgotten(job)
    return now


def _forgotten(job: Job) -> Job:
    return replace(job, state=FORGOTTEN, ended_at=None)
