"""`manager finetune axonn`: one of the ranks that mpirun, srun or torchrun has started."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from engine.jobs.axonn_grid import Parallelism
from engine.jobs.settings import JobSettings
from manager.finetune.axonn_launch import detect
from manager.finetune.axonn_options import parallelism_options
from manager.finetune.extras import require
from manager.finetune.options import job_options
from proto.errors import Error

LATER_S: Final = 2.0


class RankCommand(click.Command):
    """A command that is started many times at once: what is wrong with its words is said once."""

    def make_context(self, *args: Any, **values: Any) -> click.Context:
        """As click does; without a word in all ranks but the first."""
        with _first_rank_speaks():
            return super().make_context(*args, **values)

    def invoke(self, ctx: click.Context) -> Any:
        """The same; once the ranks have met, they agree on who speaks."""
        with _first_rank_speaks():
            return super().invoke(ctx)


@contextmanager
def _first_rank_speaks() -> Iterator[None]:
    from manager.finetune.axonn_link import LostError

    try:
        yield
    except LostError:
        raise  # what this rank alone knows
    except (click.ClickException, Error) as exc:
        if detect(os.environ).rank == 0:
            raise
        # A launcher ends the others when one leaves with an error.
        time.sleep(LATER_S)
        os._exit(exc.exit_code)


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
    from manager.finetune.axonn_running import run_rank

    run_rank(launch, settings, parallelism, as_json=as_json)
