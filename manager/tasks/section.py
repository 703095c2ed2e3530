"""One task's section: its worker, told to the other tasks, and started anew when it dies.

Knows Slurm's task and the worker's command line. What the pipeline does is the first task's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from manager.spawn import environment
from manager.tasks.node_address import own_address
from manager.tasks.rendezvous import Rendezvous, TaskNote, TaskState
from manager.tasks.slurm_task import SlurmTask
from manager.worker_process import WorkerProcess, end_all
from proto.cores import cores_each
from proto.errors import Error, UsageError

if TYPE_CHECKING:
    from manager.slurm.pipeline_job import PipelineJob

MAX_RESTARTS: Final = 2  # of one worker; one that dies more often will die again
CUDA_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"


class Section:
    """The worker of this task."""

    def __init__(
        self, task: SlurmTask, job: PipelineJob, rendezvous: Rendezvous, secret_file: Path
    ) -> None:
        self._task, self._job, self._rendezvous = task, job, rendezvous
        self._secret_file = secret_file
        self.log: Final = rendezvous.folder / f"worker-{task.rank}.log"
        self._generation = 0
        self._host = ""

    async def hold(self) -> None:
        """Keep a worker running until cancelled.

        Raises:
            Error: it could not be started, or died too often; the other tasks are told as well.
        """
        try:
            self._host = await asyncio.to_thread(own_address, self._task, self._job.interface)
            while True:
                died = await self._run_once()
                self._generation += 1
                if self._generation > MAX_RESTARTS:
                    raise Error(
                        f"its worker ended {self._generation} times, at last so: {died}; "
                        f"its log is {self.log}"
                    )
                self._publish(TaskState.RESTARTING, detail=str(died))
                self.say(f"its worker ended ({died}) and is started anew")
        except Error as exc:
            self._publish(TaskState.FAILED, detail=str(exc))
            raise

    def say(self, text: str) -> None:
        """A line of the job's log."""
        say(f"section {self._task.rank} on {self._task.node}: {text}")

    async def _run_once(self) -> Error:
        """Run a worker until it ends, and say why it did.

        Raises:
            Error: it never got ready.
        """
        self._publish(TaskState.STARTING)
        started_s, shown = time.monotonic(), [0]

        def show(loading: str, percent: int) -> None:
            if percent >= shown[0] + 25:
                shown[0] = percent - percent % 25
                self.say(f"loading, {loading}")

        with self.log.open("a", encoding="utf-8") as log:
            worker = await WorkerProcess.start(
                f"the worker on {self._task.node}",
                self._words(),
                self._environment(),
                on_loading=show,
                on_line=lambda line: print(line, file=log, flush=True),
            )
            try:
                address = await worker.ready()
                took_s = time.monotonic() - started_s
                self.say(f"{worker.ready_line} after {took_s:.1f} s")
                self._publish(TaskState.READY, address=str(address))
                return await worker.ended()
            finally:
                await end_all([worker])

    def _publish(self, state: TaskState, address: str = "", detail: str = "") -> None:
        self._rendezvous.publish(
            TaskNote(
                rank=self._task.rank,
                node=self._task.node,
                state=state,
                address=address,
                generation=self._generation,
                detail=detail,
            )
        )

    def _words(self) -> list[str]:
        host = f"[{self._host}]" if ":" in self._host else self._host
        words = ["--sections", str(self._task.num_tasks), "--index", str(self._task.rank)]
        words += ["--listen", f"{host}:0", "--secret-file", str(self._secret_file)]
        words += ["--log-format", "json", *self._job.worker_words()]
        return [*words, "--threads", str(self._job.threads or threads(self._task))]

    def _environment(self) -> dict[str, str]:
        # A comboio.toml where the job was submitted is for workers that people start.
        found = environment(os.environ)
        gpu = own_gpu(self._task, os.environ)
        if gpu is None:
            return found
        self.say(f"takes GPU {gpu}")
        return found | {CUDA_VARIABLE: gpu}


def threads(task: SlurmTask) -> int:
    """The CPU threads of a task: what Slurm gave it, at most the cores that it may run on."""
    share = max(1, (task.cpus_on_node or cores_each(1)) // task.num_local_tasks)
    return min(task.cpus_per_task or share, cores_each(1))


def own_gpu(task: SlurmTask, environ: Mapping[str, str]) -> str | None:
    """Which of the node's GPUs this task takes, as `CUDA_VISIBLE_DEVICES` names it.

    Returns:
        None where Slurm gave none, or has divided them already.
    Raises:
        UsageError: the node has fewer GPUs than tasks.
    """
    gpus = [name for name in environ.get(CUDA_VARIABLE, "").split(",") if name]
    if len(gpus) < 2:
        return None
    if len(gpus) < task.num_local_tasks:
        raise UsageError(
            f"{task.node} has {len(gpus)} GPUs for {task.num_local_tasks} tasks: ask for as many "
            "with --gpus-per-node, or for fewer --tasks-per-node."
        )
    return gpus[task.local_rank]


def say(text: str) -> None:
    """One line of the job's log, whole even where tasks write at the same time."""
    click.echo(text, err=True)
