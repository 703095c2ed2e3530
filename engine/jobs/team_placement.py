"""Which GPU each process of a run takes, and whether and when it may load the whole model.

Each process reads the whole model once; where it then keeps a part of it, and the whole does not
fit beside the others' in its host's memory, one loads after another.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from engine.checkpoint import Checkpoint
from engine.jobs.base_model import Placement, choose_placement, reference
from engine.jobs.job import Watcher
from engine.jobs.settings import TrainingSettings
from engine.jobs.stopping import StopRequest
from engine.jobs.team import Team
from proto.errors import Error, UsageError
from proto.free_memory import free_cpu_bytes

GB: Final = 10**9


def num_gpus() -> int:
    """That torch sees here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def place(training: TrainingSettings, team: Team, stop: StopRequest) -> Placement:
    """A GPU of its own for this process; or the CPU, if that was asked for or no rank sees a GPU.

    Raises:
        UsageError: there are fewer GPUs than ranks, or only some ranks see one.
    """
    count = 0 if training.device == "cpu" else num_gpus()
    if count == 0:
        _check_own_device(None, team, stop)
        return choose_placement(training)
    host = team.hosts[team.rank]
    if training.device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {training.device}: each rank takes a GPU of its own here; leave the option "
            "out, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if count > 1 and team.local_rank >= count:
        raise UsageError(
            f"{team.hosts.count(host)} ranks were started on {host}, which shows {count} GPUs: "
            f"start one a GPU (srun --ntasks-per-node={count}, or mpirun --map-by "
            f"ppr:{count}:node)."
        )
    index = team.local_rank if count > 1 else 0
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    _check_own_device(str(uuid if uuid is not None else team.rank), team, stop)
    return choose_placement(replace(training, device=f"cuda:{index}"))


def _check_own_device(gpu: str | None, team: Team, stop: StopRequest) -> None:
    """NCCL hangs where two processes share a GPU, and knows no CPU."""
    host = team.hosts[team.rank]
    team.tell(f"device/{team.rank}", [host, gpu])
    taken: dict[tuple[str, str], int] = {}
    without: int | None = None
    for rank in range(team.num_ranks):
        host, gpu = team.ask(f"device/{rank}", stop, "training began")
        if gpu is None:
            without = rank
        elif (host, gpu) in taken:
            raise UsageError(
                f"ranks {taken[host, gpu]} and {rank} see the same one GPU of {host}: start one "
                "rank a GPU, and give each its own (srun --gpus-per-task=1, or all GPUs to all "
                "tasks)."
            )
        else:
            taken[host, gpu] = rank
    if without is not None and taken:
        (host, _), rank = next(iter(taken.items()))
        raise UsageError(
            f"rank {rank} on {host} sees a GPU, and rank {without} on {team.hosts[without]} none: "
            "start all where there is one, or pass --device cpu."
        )


def check_room(team: Team, checkpoint: Checkpoint, placement: Placement, stop: StopRequest) -> None:
    """Ranks of one host that all keep the whole model, on its CPU, have room for it.

    Raises:
        Error: they have not.
    """
    host = team.hosts[team.rank]
    if team.rank != team.hosts.index(host):  # nobody loads before it was looked at
        team.ask(f"room/{host}", stop, "training began")
        return
    count, size = team.hosts.count(host), _whole_bytes(checkpoint, placement)
    if count > 1 and placement.device.type == "cpu" and size is not None:
        free = free_cpu_bytes()
        if count * size > free:
            raise Error(
                f"{count} ranks on {host} each hold {checkpoint.name}, {count} x {size / GB:.1f} "
                f"GB in {placement.dtype_name}, and {free / GB:.1f} GB are free: start fewer ranks "
                "there, or pass --dtype bfloat16."
            )
    team.tell(f"room/{host}", True)


def wait_for_room(
    team: Team, checkpoint: Checkpoint, placement: Placement, watcher: Watcher, stop: StopRequest
) -> None:
    """Ranks of one host load the whole model one after another where its memory asks for that."""
    host = team.hosts[team.rank]
    here = [rank for rank, it in enumerate(team.hosts) if it == host]
    if team.rank == here[0]:
        team.tell(f"turns/{host}", len(here) > 1 and not _fits(checkpoint, placement, len(here)))
        return
    if team.ask(f"turns/{host}", stop, "training began"):
        watcher.busy("waiting for the memory that another rank loads the model in")
        team.ask(f"sharded/{here[here.index(team.rank) - 1]}", stop, "training began")


def wait_for_all(team: Team, stop: StopRequest) -> None:
    """Before the first exchange, whose own patience is shorter than some file systems' answers."""
    team.tell(f"sharded/{team.rank}", True)
    for rank in range(team.num_ranks):
        team.ask(f"sharded/{rank}", stop, "training began")


def _fits(checkpoint: Checkpoint, placement: Placement, times: int) -> bool:
    """Whether so many whole models have room; of a hub's model that is not known before."""
    size = _whole_bytes(checkpoint, placement)
    return size is not None and times * size <= free_cpu_bytes()


def _whole_bytes(checkpoint: Checkpoint, placement: Placement) -> int | None:
    if not Path(reference(checkpoint)).is_dir():
        return None
    whole = sum(math.prod(checkpoint.entry(key).shape) for key in checkpoint)
    return whole * placement.dtype.itemsize
