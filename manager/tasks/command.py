"""`manager task`: what the sbatch scripts start with srun, once a task. Nobody types it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manager.llama_server.options import config_options
from manager.slurm.pipeline_job import PipelineJob, pipeline_job_options

if TYPE_CHECKING:
    from manager.llama_server.config import LlamaServerConfig


@click.group(hidden=True)
def task() -> None:
    """What a job's sbatch script starts on each node."""


@task.command()
@click.option(
    "--job-folder",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The job's own folder, which all nodes see.",
)
@pipeline_job_options
def pipeline(job_folder: Path, job: PipelineJob) -> None:
    """Hold one section of the pipeline; the first task does the job's work as well."""
    from manager.tasks.pipeline import run_task
    from manager.tasks.slurm_task import read_task

    run_task(read_task(os.environ), job, job_folder)


@task.command()
@click.option(
    "--job-folder",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The job's own folder, which all nodes see.",
)
@config_options(job=True)
@click.option("--overwrite", is_flag=True, help="Begin --prompts anew where results are there.")
def llama_server(job_folder: Path, config: LlamaServerConfig, overwrite: bool) -> None:
    """Run llama-server in the first task, an rpc-server in every other one."""
    from manager.llama_server.question import read_question
    from manager.tasks.llama_server import run_task
    from manager.tasks.slurm_task import read_task

    task = read_task(os.environ)
    run_task(task, config, read_question(config), job_folder, overwrite=overwrite)
