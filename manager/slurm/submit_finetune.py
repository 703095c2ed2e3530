"""`manager submit lora|sft|axonn`: the options of `manager finetune ...`, as a job.

What is trained and how is checked here with the same settings as there; the job gets the words as
they were typed. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import click

from engine.jobs.axonn_grid import Parallelism, make_grid
from engine.jobs.settings import JobSettings
from manager.finetune.axonn_options import parallelism_options
from manager.finetune.options import job_options
from manager.finetune.sft import sft as sft_here
from manager.slurm.pipeline_job import check_model, words_of
from manager.slurm.scripts import Submission, find_script
from manager.slurm.site import Site, site_options
from manager.slurm.submission_options import (
    Asked,
    own_options,
    publish,
    submission_options,
)
from proto.errors import UsageError

SFT_OPTIONS: Final = {"num_processes", "rdzv_backend", "interface", "mixed_precision"}
NODES: Final = click.option(
    "--nodes", "-N", type=click.IntRange(min=1), default=1, show_default=True, metavar="N"
)
TASKS: Final = click.option(
    "--tasks-per-node",
    type=click.IntRange(min=1),
    metavar="N",
    help="Ranks a node. Default: its GPUs (--gpus-per-node), or one.",
)


@click.command()
@job_options("lora")
@NODES
@TASKS
@site_options
@submission_options
@click.pass_context
def lora(
    ctx: click.Context,
    settings: JobSettings,
    nodes: int,
    tasks_per_node: int | None,
    site: Site,
    asked: Asked,
) -> None:
    """Fine-tune a model by LoRA in a Slurm job: one rank on each GPU; with --no-cuda on CPUs."""
    if settings.training.device == "cpu":
        flags = [f"--nodes={nodes}", f"--ntasks-per-node={tasks_per_node or 1}"]
        submit_finetuning(ctx, "lora", "lora-cpu.sbatch", settings, site, asked, flags)
        return
    gpus = gpus_of(site)
    tasks = tasks_per_node or whole(gpus) or 1
    flags = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    if gpus is not None and site.gpus_per_node is None:
        # The script's own --gpus-per-node=1 would hide the others of --gres from srun.
        flags.append(f"--gpus-per-node={gpus}")
    submit_finetuning(ctx, "lora", "lora.sbatch", settings, site, asked, flags)


@click.command()
@job_options("sft")
@NODES
@site_options
@submission_options
@click.pass_context
def sft(
    ctx: click.Context,
    /,
    settings: JobSettings,
    nodes: int,
    site: Site,
    asked: Asked,
    **_: Any,
) -> None:
    """Fine-tune with trl's SFTTrainer in a Slurm job: one process on each GPU of each node."""
    flags = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    submit_finetuning(ctx, "sft", "sft.sbatch", settings, site, asked, flags)


# What the run itself takes beside the settings; that of a node's GPUs is the site's.
sft.params += [it for it in sft_here.params if it.name in SFT_OPTIONS]


@click.command()
@job_options("axonn")
@parallelism_options
@NODES
@TASKS
@site_options
@submission_options
@click.pass_context
def axonn(
    ctx: click.Context,
    settings: JobSettings,
    parallelism: Parallelism,
    nodes: int,
    tasks_per_node: int | None,
    site: Site,
    asked: Asked,
) -> None:
    """Fine-tune by LoRA on AxoNN's sharded layers in a Slurm job: one rank on each GPU."""
    tasks = tasks_per_node or whole(gpus_of(site)) or 1
    make_grid(parallelism, nodes * tasks, f"{nodes} nodes with {tasks} tasks each")
    flags = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    submit_finetuning(ctx, "axonn", "axonn.sbatch", settings, site, asked, flags)


def submit_finetuning(
    ctx: click.Context,
    method: str,
    script: str,
    settings: JobSettings,
    site: Site,
    asked: Asked,
    flags: Sequence[str],
) -> None:
    """Check what can be checked here, and submit.

    Args:
        flags: of sbatch, beside the site's.
    Raises:
        UsageError: the model or the run's folder would be refused in the job.
        JobError: sbatch said no.
    """
    from engine.jobs.run_folder import check_run_folder

    check_model(settings.base_model)
    check_run_folder(settings.output)
    publish(
        Submission(
            backend=method,
            script=find_script(script),
            name=asked.name or f"comboio-{method}",
            site=site,
            flags=(*flags, *asked.flags()),
            words=tuple(words_of(ctx, own_options(ctx) - {"nodes", "tasks_per_node"})),
            variables=asked.variables(),
        ),
        asked,
    )


def gpus_of(site: Site) -> str | None:
    """GPUs of a node, as --gpus-per-node or --gres has them: "4", or "a100:4"; None: not said."""
    if site.gpus_per_node is not None:
        return site.gpus_per_node
    for resource in (site.gres or "").split(","):
        kind, _, rest = resource.partition(":")
        if kind == "gpu":
            return rest if rest.rpartition(":")[2].isdigit() else f"{rest}:1" if rest else "1"
    return None


def whole(gpus: str | None) -> int | None:
    """How many GPUs `--gpus-per-node` means: "4", or "a100:4".

    Raises:
        UsageError: it has no number.
    """
    if gpus is None:
        return None
    number = gpus.rpartition(":")[2]
    if not number.isdigit():
        raise UsageError(f"--gpus-per-node {gpus}: write a number, or a kind and a number, a100:4.")
    return int(number)
