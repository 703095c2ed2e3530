"""What one task of a pipeline job does: hold its section and, if it is the first, lead the work."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Final

from manager import event_loop
from manager.cli import Interrupted
from manager.slurm.pipeline_job import PipelineJob
from manager.tasks.lead import Lead
from manager.tasks.rendezvous import Rendezvous
from manager.tasks.section import Section
from manager.tasks.slurm_task import SlurmTask

EXIT_WOUND_UP: Final = 75  # as sysexits.h's EX_TEMPFAIL: try again, and it goes on
WIND_UP_S: Final = 20.0  # how long a section outlives the signal, for the first task's sake


def run_task(task: SlurmTask, job: PipelineJob, job_folder: Path) -> None:
    """Run this task to its end.

    Raises:
        Error: in one sentence, from the first task.
        Interrupted: Slurm told the job to end; what was done is kept.
    """
    rendezvous = Rendezvous(job_folder, task)
    section = Section(task, job, rendezvous, job_folder / "secret")
    lead = Lead(task, job, rendezvous, job_folder / "secret") if task.is_first else None
    work = follow(rendezvous, section) if lead is None else head(lead, rendezvous, section)
    try:
        event_loop.run(work)
    except Interrupted as exc:
        exc.exit_code = EXIT_WOUND_UP
        exc.args = (f"Slurm told section {task.rank} to end",)
        if lead is not None:
            exc.args = (f"Slurm told the job to end: {lead.kept}",)
        raise


async def head(lead: Lead, rendezvous: Rendezvous, section: Section) -> None:
    """Hold the first section and do the job's work; then everybody may go."""
    holding = asyncio.ensure_future(section.hold())
    try:
        await lead.run()
    finally:
        rendezvous.publish_end()
        await _end(holding)


async def follow(rendezvous: Rendezvous, section: Section) -> None:
    """Hold a section until the first task is done; after a signal too, for a while."""
    holding = asyncio.ensure_future(section.hold())
    try:
        await rendezvous.until_end()
    except asyncio.CancelledError:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rendezvous.until_end(), WIND_UP_S)
        raise
    finally:
        await _end(holding)


async def _end(holding: asyncio.Future[None]) -> None:
    """A section that failed has told the first task, which says so."""
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
