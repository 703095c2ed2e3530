"""`manager finetune lora`: LoRA in one process, or one on each GPU."""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from engine.jobs.settings import JobSettings, TrainingSettings
from manager.finetune.extras import require
from manager.finetune.options import job_options
from manager.finetune.ranks_command import RankCommand
from manager.finetune.ranks_launch import Launch, detect
from proto.cores import cores_each
from proto.errors import UsageError

if TYPE_CHECKING:
    from engine.jobs.job import Result, Watcher
    from engine.jobs.stopping import StopRequest
    from engine.jobs.team import Team

# More on one machine are a slip of the pen; over nodes a launcher starts them.
MAX_PROCESSES: Final = 128


@click.command(cls=RankCommand)
@job_options("lora")
@click.option(
    "--processes",
    type=int,
    metavar="N",
    help="Processes on this machine, each with rows of its own. Default: one on each GPU, or one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print paths and figures as JSON.")
def lora(settings: JobSettings, processes: int | None, as_json: bool) -> None:
    """Fine-tune a model by LoRA, on the CPU, on one GPU, or on several.

    Started by srun, mpirun or torchrun, it is one rank of theirs; alone, it starts one process on
    each GPU that it sees. Each learns from --per-device-train-batch-size rows of its own at a time.

    SAVE_DIR gets lora_adapters, merged_model, checkpoints, metrics.jsonl, TensorBoard's files, a
    picture of the losses and report.md. A run that was ended goes on with --resume.
    """
    launch = detect(os.environ)
    require("peft", "manager finetune lora")
    _check_processes(processes, launch)
    if launch.num_ranks > 1:
        from manager.finetune.ranks_running import run_rank

        run_rank(work, settings, launch, as_json=as_json)
        return
    from engine.jobs.run_folder import check_run_folder

    check_run_folder(settings.output)
    count = _count(processes, settings.training)
    if count > 1:
        from manager.finetune.ranks_here import run_here

        run_here(work, _with_threads(settings, count), count, as_json=as_json)
        return
    from engine.jobs.lora import run_lora
    from manager.finetune.running import run_job

    run_job(run_lora, settings, as_json=as_json)


def work(settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest) -> Result | None:
    """One rank's part."""
    from engine.jobs.lora import run_lora_together

    return run_lora_together(settings, team, watcher, stop)


def _check_processes(processes: int | None, launch: Launch) -> None:
    if processes is not None and not 1 <= processes <= MAX_PROCESSES:
        raise UsageError(f"--processes {processes} must be from 1 to {MAX_PROCESSES}.")
    if launch.num_ranks > 1 and processes not in (None, launch.num_ranks):
        raise UsageError(
            f"--processes {processes}, and {launch.launcher} started {launch.num_ranks}: leave the "
            "option out, or start as many."
        )


def _count(processes: int | None, training: TrainingSettings) -> int:
    """How many ranks there are to be here.

    Raises:
        UsageError: there are fewer GPUs.
    """
    if training.device == "cpu" or processes == 1:
        return processes or 1
    if training.device not in ("auto", "cuda"):  # one that was named
        if processes is not None:
            raise UsageError(
                f"--device {training.device} is one GPU, and --processes {processes} were asked "
                "for: leave it out, and choose GPUs with CUDA_VISIBLE_DEVICES."
            )
        return 1
    from engine.jobs.team_placement import num_gpus

    gpus = num_gpus()
    if gpus and processes is not None and processes > gpus:
        raise UsageError(
            f"--processes {processes}: torch sees {gpus} GPUs on {platform.node()}; pass "
            f"--processes {gpus}, or --no-cuda."
        )
    return processes or max(gpus, 1)


def _with_threads(settings: JobSettings, processes: int) -> JobSettings:
    """On the CPU, each gets its part of the cores."""
    training = settings.training
    if training.threads is not None or os.environ.get("OMP_NUM_THREADS"):
        return settings
    return replace(settings, training=replace(training, threads=cores_each(processes)))
