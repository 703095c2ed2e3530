"""`manager finetune sft`: trl's SFTTrainer under `accelerate launch`.

In one process, one on each GPU of this machine, or one on each GPU of a job's nodes. Imports
nothing heavy until a run begins.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from engine.jobs.settings import JobSettings, TrainingSettings
from engine.jobs.sft_job import MIXED_PRECISIONS, SftJob
from manager.finetune.extras import require
from manager.finetune.options import job_options
from manager.finetune.sft_launch import RDZV_BACKENDS, Launch
from manager.finetune.sft_machines import Machines, find_machines
from proto.cores import cores_each
from proto.errors import UsageError

if TYPE_CHECKING:
    from engine.jobs.job import Watcher
    from engine.jobs.stopping import StopRequest

COMMAND: Final = "manager finetune sft"
MAX_PROCESSES: Final = 4096
# As torch's own for gloo; NCCL's ten minutes are short for a first process that saves a large
# checkpoint to a busy file system.
TIMEOUT_S: Final = 1800.0


@click.command()
@job_options("sft")
@click.option(
    "--num-processes",
    type=int,
    metavar="N",
    help="Processes of all machines together. Default: one on each GPU, or one.",
)
@click.option(
    "--gpus-per-node",
    "--nproc-per-node",
    "gpus_per_node",
    type=int,
    metavar="N",
    help="The same, of each machine.",
)
@click.option("--num-machines", type=int, metavar="N", help="Default: the nodes of the Slurm step.")
@click.option("--machine-rank", type=int, metavar="R", help="Of this machine, from 0.")
@click.option("--main-process-ip", metavar="HOST", help="The first machine.")
@click.option("--main-process-port", type=int, metavar="PORT", help="A port that is free there.")
@click.option(
    "--rdzv-backend",
    type=click.Choice(RDZV_BACKENDS),
    default="static",
    show_default=True,
    help="How machines meet. With c10d any of them may get the first process.",
)
@click.option("--interface", metavar="NAME", help="Network interface that the machines share.")
@click.option(
    "--mixed-precision",
    type=click.Choice(("auto", *MIXED_PRECISIONS)),
    default="auto",
    show_default=True,
    help="Of the arithmetic beside float32. auto: as --dtype on a GPU.",
)
@click.option("--json", "as_json", is_flag=True, help="Print paths and figures as JSON.")
def sft(
    settings: JobSettings,
    num_processes: int | None,
    gpus_per_node: int | None,
    num_machines: int | None,
    machine_rank: int | None,
    main_process_ip: str | None,
    main_process_port: int | None,
    rdzv_backend: str,
    interface: str | None,
    mixed_precision: str,
    as_json: bool,
) -> None:
    """Fine-tune with trl's SFTTrainer, on as many GPUs and nodes as there are.

    In a Slurm job, start it once a node: `srun --ntasks-per-node=1 manager finetune sft ...`.
    SAVE_DIR gets the same as from `manager finetune lora`; launch/ in it has the config file of
    `accelerate launch`, and a log of each process.
    """
    for package in ("peft", "trl", "accelerate", "datasets"):
        require(package, COMMAND)
    from engine.jobs.run_folder import LAUNCH, check_run_folder

    check_run_folder(settings.output)
    machines = find_machines(
        os.environ,
        count=num_machines,
        rank=machine_rank,
        address=main_process_ip,
        port=main_process_port,
    )
    if interface is not None:
        from manager.tasks.node_address import interface_address

        interface_address(interface, platform.node())
    on_cpu, precision, num_gpus = _arithmetic(settings.training, mixed_precision)
    here, total = _count(machines, num_processes, gpus_per_node, on_cpu, num_gpus)
    if settings.training.device.startswith("cuda:") and total > 1:
        raise UsageError(
            f"--device {settings.training.device} is one GPU, and {total} processes were asked "
            "for: leave it out, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    run_folder = Path(settings.output.save_dir).expanduser().resolve()
    launch = Launch(
        job=SftJob(
            settings=settings,
            num_processes=total,
            on_cpu=on_cpu,
            mixed_precision=precision,
            timeout_s=TIMEOUT_S,
        ),
        machines=machines,
        processes_here=here,
        rdzv_backend=rdzv_backend,
        threads=settings.training.threads or _threads(here),
        interface=interface,
        folder=run_folder / LAUNCH,
    )
    from manager.finetune.running import follow_run

    follow_run(settings, lambda watcher, stop: _follow(launch, watcher, stop), as_json=as_json)


def _follow(launch: Launch, watcher: Watcher, stop: StopRequest) -> dict[str, Any] | None:
    from manager.finetune.sft_running import Run

    total, machines = launch.job.num_processes, launch.machines
    parts = "1 process" if total == 1 else f"{total} processes"
    if not machines.is_alone:
        parts += f" on {machines.count} machines, of which this is number {machines.rank}"
    watcher.busy(f"starting {parts}")
    return Run(launch, watcher, stop).follow()


def _arithmetic(training: TrainingSettings, mixed: str) -> tuple[bool, str, int]:
    """(whether on the CPU, mixed precision, GPUs of this machine).

    Raises:
        UsageError: this machine cannot do what was asked for.
    """
    if training.device == "cpu":
        return True, _on_cpu(training, mixed), 0
    import torch

    from engine.jobs.base_model import choose_placement

    placement = choose_placement(training)
    if placement.device.type == "cpu":
        return True, _on_cpu(training, mixed), 0
    if mixed == "auto":
        mixed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(placement.dtype, "no")
    if mixed == "bf16" and not torch.cuda.is_bf16_supported():
        raise UsageError(
            f"--mixed-precision bf16: {torch.cuda.get_device_name()} has no bfloat16; pass fp16."
        )
    return False, mixed, torch.cuda.device_count()


def _on_cpu(training: TrainingSettings, mixed: str) -> str:
    if mixed not in ("auto", "no"):
        raise UsageError(
            f"--mixed-precision {mixed} is for GPUs, and training runs on the CPU here: leave it "
            "out, or pass --dtype bfloat16 for the base weights."
        )
    if training.quantize != "none":
        raise UsageError(
            "--quantize 4bit (QLoRA) needs a GPU, and training runs on the CPU here: leave it "
            "out, or run on a node that has one."
        )
    return "no"


def _count(
    machines: Machines, total: int | None, each: int | None, on_cpu: bool, num_gpus: int
) -> tuple[int, int]:
    """(processes of this machine, of all machines).

    Raises:
        UsageError: the numbers do not fit together, or there are not so many GPUs.
    """
    for name, value in (("--num-processes", total), ("--gpus-per-node", each)):
        if value is not None and not 1 <= value <= MAX_PROCESSES:
            raise UsageError(f"{name} {value} must be from 1 to {MAX_PROCESSES}.")
    if total is not None and each is not None and total != each * machines.count:
        raise UsageError(
            f"--num-processes {total} is not --gpus-per-node {each} x {machines.count} machines = "
            f"{each * machines.count}: pass one of them."
        )
    if total is not None and total % machines.count:
        raise UsageError(
            f"--num-processes {total} cannot be divided over {machines.count} machines evenly: "
            f"pass a multiple of {machines.count}."
        )
    if total is not None:
        each = total // machines.count
    if each is None:
        each = 1 if on_cpu else num_gpus
    if not on_cpu and each > num_gpus:
        raise UsageError(
            f"{each} processes were asked for on {platform.node()}, and torch sees {num_gpus} "
            f"GPUs there: pass --gpus-per-node {num_gpus}, or --no-cuda."
        )
    return each, each * machines.count


def _threads(processes: int) -> int:
    """As OMP_NUM_THREADS says, else this machine's cores divided."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else cores_each(processes)
