"""Which GPU each process of an AxoNN run takes, and when it may load the whole model.

Each process reads the whole model into its host's memory once and keeps a part of it; where these
do not fit there together, one loads after another.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint import Checkpoint
from engine.jobs.axonn_team import Team
from engine.jobs.base_model import Placement, choose_placement, reference
from engine.jobs.job import Watcher
from engine.jobs.settings import TrainingSettings
from engine.jobs.stopping import StopRequest
from proto.errors import UsageError
from proto.free_memory import free_cpu_bytes


def place(training: TrainingSettings, team: Team, stop: StopRequest) -> Placement:
    """A GPU of its own for this process; or the CPU, if that was asked for.

    Raises:
        UsageError: there is none.
    """
    if training.device == "cpu":
        return choose_placement(training)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    host = team.hosts[team.rank]
    if count == 0:
        raise UsageError(
            f"AxoNN computes on GPUs, and torch {torch.__version__} sees none on {host}: run it "
            "where each rank has one, or use manager finetune lora. --device cpu is a test mode "
            "over gloo: it shows that the arithmetic is right, and nothing of speed."
        )
    if training.device not in ("auto", "cuda"):
        raise UsageError(
            f"--device {training.device}: each rank takes a GPU of its own here; leave the option "
            "out."
        )
    if count > 1 and team.local_rank >= count:
        raise UsageError(
            f"{team.hosts.count(host)} ranks were started on {host}, which shows {count} GPUs: "
            f"start one a GPU (srun --ntasks-per-node={count}, or mpirun --map-by "
            f"ppr:{count}:node)."
        )
    index = team.local_rank if count > 1 else 0
    _check_own_gpu(index, team, stop)
    return choose_placement(replace(training, device=f"cuda:{index}"))


def _check_own_gpu(index: int, team: Team, stop: StopRequest) -> None:
    """NCCL hangs where two processes share one."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    host = team.hosts[team.rank]
    team.tell(f"gpu/{team.rank}", [host, str(uuid if uuid is not None else team.rank)])
    taken: dict[tuple[str, ...], int] = {}
    for rank in range(team.num_ranks):
        key = tuple(team.ask(f"gpu/{rank}", stop, "training began"))
        if key in taken:
            raise UsageError(
                f"ranks {taken[key]} and {rank} see the same one GPU of {key[0]}: start one rank "
                "a GPU, and give each its own (srun --gpus-per-task=1, or all GPUs to all tasks)."
            )
        taken[key] = rank


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
    if not Path(reference(checkpoint)).is_dir():
        return False
    whole = sum(math.prod(checkpoint.entry(key).shape) for key in checkpoint)
    return times * whole * placement.dtype.itemsize <= free_cpu_bytes()
