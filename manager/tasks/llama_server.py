"""What one task of a llama-server job does: the first runs llama-server, the others lend a node.

llama-server ends when one of its rpc-servers does, and an rpc-server may end with its llama-server:
so each rpc-server serves one llama-server only. The first task counts the starts; the others give
it a fresh rpc-server for each.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from manager import event_loop
from manager.cli import Interrupted
from manager.llama_server.asking import Asking
from manager.llama_server.binaries import (
    Build,
    build_of,
    check_same_build,
    find_rpc_server,
    find_server,
    free_device_bytes,
)
from manager.llama_server.config import LlamaServerConfig
from manager.llama_server.memory import check_memory
from manager.llama_server.ports import free_port
from manager.llama_server.processes import LogFile
from manager.llama_server.question import Question
from manager.llama_server.rpc_servers import RemoteRpcServers, RpcServer, RpcServers
from manager.llama_server.run import Plan, Run, plan_of
from manager.output import Notices
from manager.tasks.node_address import own_address
from manager.tasks.pipeline import EXIT_WOUND_UP, WIND_UP_S
from manager.tasks.rendezvous import Rendezvous, TaskNote, TaskState, failure, missing
from manager.tasks.section import say, threads
from manager.tasks.slurm_task import SlurmTask
from proto.errors import Error
from proto.free_memory import free_cpu_bytes

STAND_STILL_S: Final = 600.0  # without a sign of a node; starting a program takes seconds
WHAT: Final = "task"


def run_task(
    task: SlurmTask,
    config: LlamaServerConfig,
    question: Question,
    job_folder: Path,
    *,
    overwrite: bool,
) -> None:
    """Run this task to its end.

    Raises:
        Error: in one sentence, from the first task.
        Interrupted: Slurm told the job to end; what was answered is kept.
    """
    rendezvous = Rendezvous(job_folder, task)
    if not task.is_first:
        try:
            event_loop.run(follow(task, config, rendezvous))
        except Interrupted as exc:
            exc.exit_code = EXIT_WOUND_UP
            exc.args = (f"Slurm told task {task.rank} to end",)
            raise
        return
    lead(task, config, question, rendezvous, job_folder, overwrite=overwrite)


# --- the first task ---------------------------------------------------------------------------


def lead(
    task: SlurmTask,
    config: LlamaServerConfig,
    question: Question,
    rendezvous: Rendezvous,
    job_folder: Path,
    *,
    overwrite: bool,
) -> None:
    """Run llama-server over the other tasks' rpc-servers, ask it, and let everybody go."""
    notices = Notices()
    if config.keep and config.api_key_file is None:
        # Others reach it over the network: nobody but who can read the job's folder gets in.
        config = config.model_copy(update={"api_key_file": job_folder / "secret"})
    log_path = rendezvous.folder / "llama-server.log"
    try:
        with (
            Asking(config, question, notices, overwrite=overwrite and not task.restart) as asking,
            LogFile(log_path) as log,
        ):
            run = JobRun(task, rendezvous, config, question, asking, log, notices)
            try:
                event_loop.run(run.run())
            except Interrupted as exc:
                if run.is_kept:
                    return
                exc.exit_code = EXIT_WOUND_UP
                exc.args = (f"Slurm told the job to end: {asking.kept or 'nothing is kept'}",)
                raise
    finally:
        rendezvous.publish_end()


class JobRun(Run):
    """A run whose rpc-servers are the other tasks'."""

    def __init__(
        self, task: SlurmTask, rendezvous: Rendezvous, config: LlamaServerConfig, *rest: Any
    ) -> None:
        super().__init__(config, *rest)
        self._task, self._rendezvous = task, rendezvous
        self._generation = -1

    def prepare(self) -> Plan:
        """Look at everything that this node needs."""
        # Without --keep nobody else has any business with it.
        host = own_address(self._task, self._config.interface) if self._config.keep else LOCAL
        return plan_of(
            self._config,
            self._question,
            host=host,
            num_rpc_servers=self._task.num_tasks - 1,
            threads=threads(self._task),
        )

    @asynccontextmanager
    async def rpc_servers(self, plan: Plan) -> AsyncIterator[RpcServers]:
        """Fresh ones of all other tasks."""
        self._generation += 1
        self._publish()
        notes = await self._all_ready()
        others = [notes[rank] for rank in sorted(notes) if rank != 0]
        if others:
            own = await event_loop.in_background(own_build, self._config)
            check_same_build({self._task.node: own} | {it.node: _build(it) for it in others})
            self._check_memory(plan, others)
        self._describe(others)
        yield RemoteRpcServers([it.address for it in others], self._lost if others else None)

    def _publish(self) -> None:
        self._rendezvous.publish(
            TaskNote(
                rank=0,
                node=self._task.node,
                state=TaskState.READY,
                generation=self._generation,
            )
        )

    async def _all_ready(self) -> dict[int, TaskNote]:
        """Wait until every other task has an rpc-server of this generation.

        Raises:
            Error: one failed for good, or gives no sign.
        """
        waited = 0.0
        async for notes in self._rendezvous.changes():
            if failed := failure(notes, WHAT):
                raise failed
            fresh = {
                rank: note for rank, note in notes.items() if note.generation == self._generation
            }
            late = missing(fresh, self._task.num_tasks)
            if not late:
                return fresh
            waited += 0.2
            if waited > STAND_STILL_S:
                raise Error(
                    f"task {late[0]} has no rpc-server after {STAND_STILL_S:g} s: its node may be "
                    f"gone; what it said is in {self._rendezvous.folder}"
                )
        raise AssertionError("changes() does not end")

    async def _lost(self) -> str:
        """Wait until a task's rpc-server ends; which, and why."""
        async for notes in self._rendezvous.changes():
            for note in notes.values():
                if note.rank != 0 and note.state is not TaskState.READY:
                    return f"on {note.node}, {note.detail}"
        raise AssertionError("changes() does not end")

    def _check_memory(self, plan: Plan, others: Sequence[TaskNote]) -> None:
        if not self._config.check_memory:
            return
        free = {it.node: int((it.facts or {}).get("free_bytes", 0)) for it in others}
        check_memory(plan.model, plan.need, free, plan.settings.tensor_split)

    def _describe(self, others: Sequence[TaskNote]) -> None:
        say(f"{self._task.node} runs llama-server")
        for note in others:
            say(f"{note.node} lends itself with an rpc-server at {note.address}")


LOCAL: Final = "127.0.0.1"


# --- the others -------------------------------------------------------------------------------


async def follow(task: SlurmTask, config: LlamaServerConfig, rendezvous: Rendezvous) -> None:
    """Give the first task a fresh rpc-server for each of its starts, until it is done."""
    lending = asyncio.ensure_future(_lend(task, config, rendezvous))
    try:
        await rendezvous.until_end()
    except asyncio.CancelledError:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rendezvous.until_end(), WIND_UP_S)
        raise
    finally:
        lending.cancel()
        await asyncio.gather(lending, return_exceptions=True)


async def _lend(task: SlurmTask, config: LlamaServerConfig, rendezvous: Rendezvous) -> None:
    note = TaskNote(rank=task.rank, node=task.node, state=TaskState.STARTING)
    try:
        host = await event_loop.in_background(own_address, task, config.interface)
        build = await event_loop.in_background(own_build, config)
        with LogFile(rendezvous.folder / f"rpc-server-{task.rank}.log") as log:
            generation = -1
            while True:
                generation = await _next_generation(rendezvous, generation)
                note = replace(note, generation=generation)
                await _lend_once(task, config, rendezvous, note, host, build, log)
    except Error as exc:
        rendezvous.publish(replace(note, state=TaskState.FAILED, detail=str(exc)))


async def _lend_once(
    task: SlurmTask,
    config: LlamaServerConfig,
    rendezvous: Rendezvous,
    note: TaskNote,
    host: str,
    build: Build,
    log: LogFile,
) -> None:
    """One rpc-server, until it ends or the first task starts anew."""
    server = RpcServer(
        find_rpc_server(config.dir_llama_script, os.environ),
        name="rpc-server",
        host=host,
        # Of one job a node: two jobs on a node take different free ports.
        port=config.port_rpc or free_port(host),
        threads=config.threads or threads(task),
        more_words=config.rpc_args,
        on_line=log.write,
    )
    facts = {
        "version": build.version,
        "digest": build.digest,
        "free_bytes": str(await event_loop.in_background(free_bytes, config)),
    }
    tasks: list[asyncio.Future[Any]] = []
    try:
        await server.start()
        rendezvous.publish(
            replace(note, state=TaskState.READY, address=server.address, facts=facts)
        )
        tasks = [
            asyncio.ensure_future(server.process.wait()),
            asyncio.ensure_future(_next_generation(rendezvous, note.generation)),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done() and not tasks[1].done():
            rendezvous.publish(replace(note, state=TaskState.RESTARTING, detail=server.loss()))
            say(f"task {task.rank} on {task.node}: {server.loss()}")
            await tasks[1]
    finally:
        for it in tasks:
            it.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.process.stop()


async def _next_generation(rendezvous: Rendezvous, after: int) -> int:
    """Wait until the first task starts anew."""
    async for notes in rendezvous.changes():
        if 0 in notes and notes[0].generation > after:
            return notes[0].generation
    raise AssertionError("changes() does not end")


def own_build(config: LlamaServerConfig) -> Build:
    """What this node's programs are.

    Raises:
        UsageError: they are missing, cannot run here, or have no RPC.
    """
    server = find_server(config.dir_llama_script, os.environ, needs_rpc=True)
    return build_of(server, find_rpc_server(config.dir_llama_script, os.environ))


def free_bytes(config: LlamaServerConfig) -> int:
    """What this node could hold of a model."""
    server = find_server(config.dir_llama_script, os.environ, needs_rpc=True)
    return free_cpu_bytes() + free_device_bytes(server, os.environ)


def _build(note: TaskNote) -> Build:
    facts: Mapping[str, str] = note.facts or {}
    return Build(facts.get("version", ""), facts.get("digest", ""))
