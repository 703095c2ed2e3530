"""`manager submit pipeline`: options become a call of sbatch with scripts/slurm/pipeline.sbatch."""

from __future__ import annotations

import click

from manager.slurm.pipeline_job import PipelineJob, pipeline_job_options, words_of
from manager.slurm.scripts import Submission, find_script
from manager.slurm.site import Site, site_options
from manager.slurm.submission_options import (
    Asked,
    own_options,
    publish,
    submission_options,
)
from proto.errors import UsageError

SCRIPT = "pipeline.sbatch"


@click.command()
@click.option(
    "--nodes",
    "-N",
    type=click.IntRange(min=1),
    required=True,
    metavar="N",
    help="How many nodes; `manager nodes --model M` says how many a model needs.",
)
@click.option(
    "--tasks-per-node",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Workers a node, each on a GPU of its own where there are GPUs.",
)
@click.option(
    "--array",
    type=click.IntRange(min=1),
    metavar="N",
    help="Divide the prompts over N jobs, each with nodes of its own; the last joins the results.",
)
@pipeline_job_options
@site_options
@submission_options
@click.pass_context
def pipeline(
    ctx: click.Context,
    nodes: int,
    tasks_per_node: int,
    array: int | None,
    job: PipelineJob,
    site: Site,
    asked: Asked,
) -> None:
    """Run the pipeline over the nodes of a Slurm job: one worker a task, section = task rank."""
    job.check_before_submitting()
    flags = [f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node}", *asked.flags()]
    log = None
    if array is not None:
        _check_array(array, job)
        flags.append(f"--array=0-{array - 1}")
        log = str(site.jobs_folder.absolute() / "%x-%A_%a.out")
    publish(
        Submission(
            backend="pipeline",
            script=find_script(SCRIPT),
            name=asked.name or "comboio-pipeline",
            site=site,
            flags=tuple(flags),
            words=tuple(words_of(ctx, own_options(ctx) - {"nodes", "tasks_per_node", "array"})),
            variables=asked.variables(),
            log=log,
        ),
        asked,
    )


def _check_array(array: int, job: PipelineJob) -> None:
    if job.prompts is None:
        raise UsageError("--array divides the rows of --prompts, and there are none: leave it out.")
    num_rows = len(job.rows())
    if array > num_rows:
        raise UsageError(
            f"--array {array}: {job.prompts} has {num_rows} prompts; ask for at most so many parts."
        )
