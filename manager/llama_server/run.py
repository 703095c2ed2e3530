"""One run of llama-server on this machine: rpc-servers, the server, the question, the end.

`plan_here` finds everything that can be wrong before a process is started. `Run` does the rest, and
leaves no process behind, whatever happens. Where the rpc-servers are elsewhere, it is derived from.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from manager.event_loop import in_background
from manager.llama_server.asking import Asking
from manager.llama_server.binaries import (
    Program,
    ServerProgram,
    find_rpc_server,
    find_server,
    free_device_bytes,
)
from manager.llama_server.command_line import ServerSettings, server_words, settings_of
from manager.llama_server.config import LlamaServerConfig
from manager.llama_server.gguf_file import ModelFile, read_model
from manager.llama_server.health import Health
from manager.llama_server.launch import RunningServer, llama_server, with_one_restart
from manager.llama_server.memory import MemoryNeed, check_memory, memory_need
from manager.llama_server.ports import check_free, free_port
from manager.llama_server.processes import LogFile
from manager.llama_server.question import Question
from manager.llama_server.rpc_servers import RpcServers, rpc_servers_here
from manager.output import Notices
from proto.cores import cores_each
from proto.errors import Error, UsageError
from proto.free_memory import free_cpu_bytes

HOST: Final = "127.0.0.1"
MAX_PORT: Final = 65535
SAY_EVERY_S: Final = 30.0  # while the model loads, for logs


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is started, checked."""

    model: ModelFile
    server: ServerProgram
    need: MemoryNeed
    settings: ServerSettings
    num_rpc_servers: int
    rpc_port: int | None  # of the first; None: free ones
    rpc_threads: int
    rpc_args: Sequence[str]
    load_timeout_s: float
    rpc_server: Program | None = None  # where rpc-servers are started here


def plan_here(config: LlamaServerConfig, question: Question) -> Plan:
    """Look at everything that a run on this machine alone needs.

    Raises:
        UsageError: the model, a program, memory or a port is missing; in one sentence.
    """
    num_rpc_servers = config.nodes - 1
    plan = plan_of(
        config,
        question,
        host=HOST,
        num_rpc_servers=num_rpc_servers,
        threads=cores_each(max(1, num_rpc_servers)),
    )
    if config.check_memory:
        free = free_cpu_bytes() + free_device_bytes(plan.server, os.environ)
        check_memory(plan.model, plan.need, {"this machine": free})
    if num_rpc_servers:
        plan = replace(plan, rpc_server=find_rpc_server(config.dir_llama_script, os.environ))
        _check_ports(config, num_rpc_servers)
    return plan


def plan_of(
    config: LlamaServerConfig,
    question: Question,
    *,
    host: str,
    num_rpc_servers: int,
    threads: int,
) -> Plan:
    """Look at what llama-server needs, wherever its rpc-servers are.

    Args:
        host: where it listens, an address of this machine.
        threads: of each process, where the configuration does not say.
    Raises:
        UsageError: the model, the program or the port is missing; in one sentence.
    """
    model = read_model(config.model)
    server = find_server(config.dir_llama_script, os.environ, needs_rpc=num_rpc_servers > 0)
    if config.port_server is not None:
        check_free(host, config.port_server, key="port_server")
    settings = settings_of(
        config,
        model,
        host=host,
        port=config.port_server or free_port(host),
        parallel=question.parallel(keep=config.keep),
        threads=threads,
    )
    server_words(server, settings, [f"{host}:1"] * num_rpc_servers)
    need = memory_need(
        model,
        context=settings.context,
        parallel=settings.parallel,
        ubatch_size=settings.ubatch_size,
    )
    return Plan(
        model=model,
        server=server,
        need=need,
        settings=settings,
        num_rpc_servers=num_rpc_servers,
        rpc_port=config.port_rpc,
        rpc_threads=config.threads or threads,
        rpc_args=config.rpc_args,
        load_timeout_s=config.load_timeout_s,
    )


def _check_ports(config: LlamaServerConfig, num_rpc_servers: int) -> None:
    if config.port_rpc is None:
        return
    last = config.port_rpc + num_rpc_servers - 1
    if last > MAX_PORT:
        raise UsageError(
            f"port_rpc is {config.port_rpc}, and the last of {num_rpc_servers} rpc-servers would "
            f"have port {last}: set it to {MAX_PORT - num_rpc_servers + 1} or less."
        )
    if config.port_server is not None and config.port_rpc <= config.port_server <= last:
        raise UsageError(
            f"port_server is {config.port_server}, and the rpc-servers have ports "
            f"{config.port_rpc} to {last}: set it to another one."
        )
    for port in range(config.port_rpc, last + 1):
        check_free(HOST, port, key="port_rpc")


class Run:
    """A run from its first process to its last."""

    def __init__(
        self,
        config: LlamaServerConfig,
        question: Question,
        asking: Asking,
        log: LogFile,
        notices: Notices,
    ) -> None:
        self._config, self._question, self._asking = config, question, asking
        self._log, self._notices = log, notices
        self.is_kept = False  # the server is only there for others
        self._num_starts = 0
        self._load_s = 0.0
        self._rpc_addresses: Sequence[str] = ()

    async def run(self) -> None:
        """Start, ask, keep up if asked to, end.

        Raises:
            Error: in one sentence; every process has ended.
        """
        try:
            plan = await in_background(self.prepare)
            await with_one_restart(lambda: self._start(plan), self._work, self._say_restart)
        except Error as exc:
            raise self._with_what_is_kept(exc) from exc
        finally:
            self._notices.clear()

    def prepare(self) -> Plan:
        """Look at everything that is needed, before anything is started.

        Raises:
            UsageError: in one sentence.
        """
        return plan_here(self._config, self._question)

    def rpc_servers(self, plan: Plan) -> AbstractAsyncContextManager[RpcServers]:
        """Fresh ones, ready for the block; called for each start."""
        return rpc_servers_here(
            plan.rpc_server,
            plan.num_rpc_servers,
            host=HOST,
            first_port=plan.rpc_port,
            threads=plan.rpc_threads,
            more_words=plan.rpc_args,
            on_line=self._log.write,
        )

    @asynccontextmanager
    async def _start(self, plan: Plan) -> AsyncIterator[RunningServer]:
        started_s = time.monotonic()
        self._num_starts += 1
        self.is_kept = False
        self._say_start(plan)
        async with self.rpc_servers(plan) as rpc_servers:
            self._rpc_addresses = rpc_servers.addresses
            async with llama_server(
                plan.server,
                plan.settings,
                rpc_servers,
                load_timeout_s=plan.load_timeout_s,
                on_state=LoadNotices(self._notices, plan.model, plan.num_rpc_servers),
                on_line=self._log.write,
            ) as server:
                self._load_s = time.monotonic() - started_s
                self._notices.say(f"ready after {self._load_s:.1f} s")
                yield server
            self._notices.show("ending the rpc-servers")

    async def _work(self, server: RunningServer) -> None:
        if self._config.keep:
            print(f"ready {server.url}", flush=True)
        await self._asking.ask(server.url, self._facts())
        if self._config.keep:
            self.is_kept = True
            self._notices.say(f"{server.url} is up until ctrl-C")
            await asyncio.get_running_loop().create_future()

    def _facts(self) -> dict[str, Any]:
        return {
            "model": str(self._config.model),
            "nodes": self._config.nodes,
            "rpc_servers": list(self._rpc_addresses),
            "load_s": self._load_s,
            "restarts": self._num_starts - 1,
        }

    def _with_what_is_kept(self, exc: Error) -> Error:
        kept = self._asking.kept
        if not kept or kept in str(exc):
            return exc
        kind = UsageError if isinstance(exc, UsageError) else Error
        return kind(f"{str(exc).rstrip('.')}; {kept}")

    def _say_start(self, plan: Plan) -> None:
        count, model = plan.num_rpc_servers, plan.model
        beside = f" and {count} rpc-server{'s' * (count > 1)}" if count else ""
        self._notices.say(
            f"starting llama-server {plan.server.version.partition(' ')[0]}{beside} for "
            f"{model.path.name}: {model.architecture}, {model.num_layers} layers, "
            f"{model.file_bytes / 1e6:.0f} MB"
        )

    def _say_restart(self, why: str) -> None:
        self._notices.say(f"{why}; starting everything once more")


class LoadNotices:
    """Shows how far a llama-server is on its way to being ready; in a log, a line now and then."""

    def __init__(self, notices: Notices, model: ModelFile, num_rpc_servers: int) -> None:
        self._notices = notices
        servers = f"{num_rpc_servers} rpc-server{'s' * (num_rpc_servers > 1)}"
        self._words = {
            Health.UNREACHABLE: f"connecting to {servers}" if num_rpc_servers else "starting",
            Health.LOADING: f"loading {model.path.name}, {model.file_bytes / 1e6:.0f} MB",
            Health.READY: "ready",
        }
        self._say_next_s = SAY_EVERY_S

    def __call__(self, health: Health, seconds: float) -> None:
        """What the server is doing, so many seconds after its start."""
        text = f"{self._words[health]}: {seconds:.0f} s"
        if seconds >= self._say_next_s and health is not Health.READY:
            self._say_next_s += SAY_EVERY_S
            self._notices.say(text)
        self._notices.show(text)
