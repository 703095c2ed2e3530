"""Which task of which job this process is, from what Slurm put into its environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proto.errors import UsageError

# "4(x2),1": two nodes with 4 tasks each, then one with 1.
_TASKS_PER_NODE: Final = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmTask:
    """One task of a job's step."""

    job_id: str
    job_name: str
    step_id: str
    restart: int  # how often the job was put back into the queue
    rank: int
    num_tasks: int
    local_rank: int  # among the tasks of this node
    num_local_tasks: int
    node: str
    num_nodes: int
    node_list: str  # compressed, as "node[1-3]"
    cpus_per_task: int | None
    cpus_on_node: int | None = None  # of the step, for all its tasks there
    array: tuple[int, int] | None = None  # (index from 0, count), of a job array's task

    @property
    def is_first(self) -> bool:
        """Whether this task leads the others."""
        return self.rank == 0


def read_task(environ: Mapping[str, str]) -> SlurmTask:
    """The task that this process is.

    Raises:
        UsageError: it is none.
    """
    try:
        node_index = int(environ.get("SLURM_NODEID", "0"))
        local = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        cpus = environ.get("SLURM_CPUS_PER_TASK")
        on_node = environ.get("SLURM_CPUS_ON_NODE")
        return SlurmTask(
            job_id=environ["SLURM_JOB_ID"],
            job_name=environ.get("SLURM_JOB_NAME", "job"),
            step_id=environ["SLURM_STEP_ID"],
            restart=int(environ.get("SLURM_RESTART_COUNT", "0")),
            rank=int(environ["SLURM_PROCID"]),
            num_tasks=int(environ["SLURM_NTASKS"]),
            local_rank=int(environ.get("SLURM_LOCALID", "0")),
            num_local_tasks=local[min(node_index, len(local) - 1)],
            node=environ["SLURMD_NODENAME"],
            num_nodes=int(environ.get("SLURM_STEP_NUM_NODES") or environ["SLURM_JOB_NUM_NODES"]),
            node_list=environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"],
            cpus_per_task=int(cpus) if cpus else None,
            cpus_on_node=int(on_node) if on_node else None,
            array=_array(environ),
        )
    except (KeyError, ValueError) as exc:
        raise UsageError(
            "this is what srun starts on each node of a job, and there is no Slurm task here: use "
            "`manager submit`, or sbatch with a file of scripts/slurm."
        ) from exc


def _array(environ: Mapping[str, str]) -> tuple[int, int] | None:
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    first, step = int(environ["SLURM_ARRAY_TASK_MIN"]), int(environ["SLURM_ARRAY_TASK_STEP"])
    index = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // max(1, step)
    return index, int(environ["SLURM_ARRAY_TASK_COUNT"])


def _tasks_per_node(text: str) -> list[int]:
    counts = []
    for match in _TASKS_PER_NODE.finditer(text):
        counts += [int(match[1])] * int(match[2] or 1)
    return counts or [1]
