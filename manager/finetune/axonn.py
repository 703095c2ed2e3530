"""`manager finetune axonn`: one of the ranks that mpirun, srun or torchrun has started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from engine.jobs.axonn_grid import Parallelism
from engine.jobs.settings import JobSettings
from manager.finetune.axonn_options import parallelism_options
from manager.finetune.extras import require
from manager.finetune.options import job_options
from manager.finetune.ranks_command import RankCommand
from manager.finetune.ranks_launch import detect

if TYPE_CHECKING:
    from engine.jobs.job import Result, Watcher
    from engine.jobs.stopping import StopRequest
    from engine.jobs.team import Team


@click.command(cls=RankCommand)
@job_options("axonn")
@parallelism_options
@click.option("--json", "as_json", is_flag=True, help="Print paths and figures as JSON.")
def axonn(settings: JobSettings, parallelism: Parallelism, as_json: bool) -> None:
    """Fine-tune a model by LoRA on AxoNN's sharded layers, tensor x data parallel.

    Started once a GPU: mpirun -np 8 --map-by ppr:4:node manager finetune axonn
    --tensor-parallelism 2 --data-parallelism 4 ..., or the same by srun or torchrun. Each rank
    learns from --per-device-train-batch-size rows of its own at a time.

    SAVE_DIR gets what `manager finetune lora` leaves. --device cpu is a test mode without GPUs.
    """
    launch = detect(os.environ)
    for package in ("peft", "axonn"):
        require(package, "manager finetune axonn", "axonn")
    from manager.finetune.ranks_running import run_rank

    def work(
        settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest
    ) -> Result | None:
        from engine.jobs.axonn import run_axonn

        return run_axonn(settings, parallelism, team, watcher, stop)

    run_rank(work, settings, launch, as_json=as_json)
