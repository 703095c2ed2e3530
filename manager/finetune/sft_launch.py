"""How the processes of a run are started: accelerate's command line, its config file, and the
environment.

Words and texts: starts nothing and writes nothing. That a launch is right is not taken on trust:
each process compares how many there are with how many were asked for.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.jobs.sft_job import SftJob
from manager.finetune.sft_machines import Machines

RDZV_BACKENDS: Final = ("static", "c10d")
# What an earlier launcher, or MPI, would tell the processes of this one.
FOREIGN: Final = (
    "ACCELERATE_",
    "TORCHELASTIC_",
    "OMPI_COMM_",
    "PMI_",
    "MV2_COMM_",
    "MPI_LOCAL",
    "FSDP_",
    "PARALLELISM_CONFIG_",
)
FOREIGN_NAMES: Final = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
}
PACKAGES: Final = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What one machine of a run starts."""

    job: SftJob
    machines: Machines
    processes_here: int
    rdzv_backend: str
    threads: int  # of each process on the CPU
    interface: str | None  # network interface that the machines share
    folder: Path  # for its files

    @property
    def job_file(self) -> Path:
        """What the processes are told."""
        return self.folder / f"job-machine{self.machines.rank}.json"

    @property
    def config_file(self) -> Path:
        """What accelerate is told."""
        return self.folder / f"accelerate-machine{self.machines.rank}.yaml"

    @property
    def log_file(self) -> Path:
        """What the launcher prints; each process has a log of its own."""
        return self.folder / f"launcher-machine{self.machines.rank}.log"


def command(launch: Launch) -> list[str]:
    """`accelerate launch` with everything said, for what is not said it guesses."""
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    for name, value in flags(launch).items():
        words += [f"--{name}"] if value is None else [f"--{name}", value]
    return [*words, "--module", "engine.jobs.sft_process", str(launch.job_file)]


def flags(launch: Launch) -> dict[str, str | None]:
    """Of `accelerate launch`; None is a flag without a value."""
    machines = launch.machines
    said: dict[str, str | None] = {
        "config_file": str(launch.config_file),
        "num_processes": str(launch.job.num_processes),
        "num_machines": str(machines.count),
        "mixed_precision": launch.job.mixed_precision,
        "dynamo_backend": "no",
        "num_cpu_threads_per_process": str(launch.threads),
    }
    if launch.job.num_processes == 1:
        return said
    # On the CPU as well: with --cpu the launcher would start one process and not say so.
    said["multi_gpu"] = None
    said["machine_rank"] = str(machines.rank)
    said["main_process_port"] = str(machines.main_port)
    if not machines.is_alone:
        said["main_process_ip"] = machines.main_address
        said["rdzv_backend"] = launch.rdzv_backend
    return said


def config_text(launch: Launch) -> str:
    """The same as accelerate's config file, for whoever wants to start the run by hand."""
    machines = launch.machines
    is_alone = launch.job.num_processes == 1
    entries = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if is_alone else "MULTI_GPU",
        "use_cpu": "true" if launch.job.on_cpu and is_alone else "false",
        "num_processes": str(launch.job.num_processes),
        "num_machines": str(machines.count),
        "machine_rank": str(machines.rank),
        "main_process_ip": machines.main_address or "null",
        "main_process_port": str(machines.main_port),
        "rdzv_backend": launch.rdzv_backend,
        "same_network": "false",
        "mixed_precision": f"'{launch.job.mixed_precision}'",
        "main_training_function": "main",
    }
    lines = [f"{name}: {value}" for name, value in entries.items()]
    own = ["OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"]
    said = environment(launch, {})
    words = [*(f"{name}={said[name]}" for name in own if name in said), *command(launch)]
    return "\n".join([f"# {shlex.join(words)}", *lines]) + "\n"


def environment(launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """For the launcher and, through it, the processes."""
    kept = {
        name: value
        for name, value in environ.items()
        if name not in FOREIGN_NAMES and not name.startswith(FOREIGN)
    }
    paths = [str(PACKAGES), *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    kept["PYTHONPATH"] = os.pathsep.join(paths)
    kept["OMP_NUM_THREADS"] = str(launch.threads)
    kept["TOKENIZERS_PARALLELISM"] = kept.get("TOKENIZERS_PARALLELISM", "false")
    if launch.job.on_cpu:
        # Without it, two processes on the CPU would be two runs that know nothing of each other.
        kept["ACCELERATE_USE_CPU"] = "true"
    if not launch.job.on_cpu and launch.job.num_processes == 1:
        # One process that sees several GPUs would be split over them by threads, as trl refuses.
        gpu = launch.job.settings.training.device.partition(":")[2] or "0"
        visible = kept.get("CUDA_VISIBLE_DEVICES", "")
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(gpu)] if visible else gpu
    if launch.interface is not None:
        for library in ("GLOO", "NCCL"):
            kept[f"{library}_SOCKET_IFNAME"] = launch.interface
    return kept
