"""Which rank a process is, from what launchers leave in its environment."""

from __future__ import annotations

import pytest

from manager.finetune.ranks_launch import MPIRUN, SRUN, TORCHRUN, detect
from proto.errors import UsageError

OF_SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OF_MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OF_TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "launcher", "numbers"),
    [
        (OF_SRUN, SRUN, (5, 8, 1)),
        (OF_MPIRUN, MPIRUN, (2, 4, 0)),
        # mpirun inside a Slurm job: Slurm numbers mpirun's own helpers.
        ({**OF_SRUN, **OF_MPIRUN}, MPIRUN, (2, 4, 0)),
        ({**OF_SRUN, **OF_MPIRUN, **OF_TORCHRUN}, TORCHRUN, (1, 2, 1)),
    ],
)
def test_the_launcher_that_started_this_process_numbers_it(environ, launcher, numbers):
    launch = detect(environ)
    assert launch.launcher == launcher
    assert (launch.rank, launch.num_ranks, launch.local_rank) == numbers


def test_a_batch_script_itself_is_no_rank():
    launch = detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"})
    assert launch.num_ranks == 1 and "nothing that starts several" in launch.launcher


def test_numbers_that_no_launcher_sets_are_refused():
    with pytest.raises(UsageError, match="RANK=2 of WORLD_SIZE=2: no torchrun sets these"):
        detect({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    with pytest.raises(UsageError, match="WORLD_SIZE='two' is no number"):
        detect({"RANK": "0", "WORLD_SIZE": "two"})


def test_help_names_the_launchers_and_loads_no_model(call):
    answer = call("finetune", "axonn", "--help")
    assert answer.code == 0
    for word in ("mpirun", "srun", "torchrun", "--tensor-parallelism", "row|column|depth"):
        assert word in answer.out
