"""How many threads a Slurm task's worker gets."""

from __future__ import annotations

from manager.tasks.section import threads
from manager.tasks.slurm_task import read_task
from proto.cores import cores_each

TASK = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURMD_NODENAME": "here",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "here",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


def test_a_task_takes_what_slurm_gave_it_and_no_more_than_it_may_run_on() -> None:
    allowed = cores_each(1)
    assert threads(read_task(TASK)) == max(1, allowed // 2)
    assert threads(read_task(TASK | {"SLURM_CPUS_ON_NODE": "2"})) == 1
    assert threads(read_task(TASK | {"SLURM_CPUS_ON_NODE": "4096"})) == allowed
    assert threads(read_task(TASK | {"SLURM_CPUS_PER_TASK": "4096"})) == allowed
