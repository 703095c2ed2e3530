"""Which process this is among those that a launcher started, from its environment alone.

Pure. The order matters: mpirun inside a Slurm job leaves Slurm's variables in place, where they
number something else. Under srun MPI is never asked: importing it there may end the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proto.errors import UsageError

TORCHRUN: Final = "torchrun"
MPIRUN: Final = "mpirun"
SRUN: Final = "srun"
NOTHING: Final = "nothing that starts several (mpirun, srun, torchrun)"

# rank, number of ranks, rank on this host
_VARIABLES: Final = {
    TORCHRUN: ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    MPIRUN: ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    # Of the step, that is of srun: in the batch script itself there is none.
    SRUN: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process among several; or alone."""

    launcher: str
    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0


def detect(environ: Mapping[str, str]) -> Launch:
    """Who started this process, and as which one.

    Raises:
        UsageError: a launcher's variables make no sense.
    """
    for launcher, names in _VARIABLES.items():
        if names[0] not in environ or names[1] not in environ:
            continue
        rank, num_ranks, local_rank = (_number(environ, name) for name in names)
        if not 0 <= rank < num_ranks or not 0 <= local_rank < num_ranks:
            raise UsageError(
                f"{names[0]}={rank} of {names[1]}={num_ranks}: no {launcher} sets these; unset "
                "them, or start this command by a launcher."
            )
        return Launch(launcher=launcher, rank=rank, num_ranks=num_ranks, local_rank=local_rank)
    return Launch(launcher=NOTHING)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "0")
    try:
        return int(text)
    except ValueError as exc:
        raise UsageError(
            f"{name}={text!r} is no number: unset it, or start this command by a launcher."
        ) from exc
