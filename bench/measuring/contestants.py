"""Start the contestants, each process on the cores that it may use, ready when the block begins.

Ours are real workers and the manager's own pipeline; llama.cpp's are llama-server alone or with
rpc-servers; the reference is transformers' `generate`. Nothing is measured here.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bench.measuring.machine import cores, cpu_flags, pinned
from manager.bench_llama import LlamaContestant
from manager.bench_streams import PipelineContestant
from manager.llama_server.binaries import Program, ServerProgram, find_rpc_server, find_server
from manager.llama_server.command_line import ServerSettings
from manager.llama_server.launch import RunningServer, llama_server
from manager.llama_server.ports import free_port
from manager.llama_server.rpc_servers import RpcServersHere, rpc_servers_here
from manager.pipeline import Pipeline
from manager.spawn import environment
from manager.worker_process import WorkerProcess, end_all
from proto.errors import Error, UsageError

LOAD_TIMEOUT_S: Final = 300.0
KV_MEMORY: Final = "768M"
QUANTIZE: Final = {"bf16": "none", "int8": "int8", "int4": "int4"}


# --- ours -------------------------------------------------------------------------------------


@asynccontextmanager
async def workers(
    model: Path,
    bits: str,
    *,
    count: int = 2,
    threads: int = 1,
    kv_memory: str = KV_MEMORY,
    more_words: Sequence[str] = (),
    only: int | None = None,
) -> AsyncIterator[list[WorkerProcess]]:
    """So many workers, one core and one thread each, over all layers of the model.

    Args:
        only: start this one alone.
    """
    started: list[WorkerProcess] = []
    words = ["--model", str(model), "--sections", str(count), "--listen", "127.0.0.1:0"]
    words += ["--dtype", "bfloat16", "--quantize", QUANTIZE[bits], "--threads", str(threads)]
    words += ["--kv-memory", kv_memory, "--log-format", "json", *more_words]
    own = cores(count) if threads == 1 else [set(os.sched_getaffinity(0))] * count
    try:
        for index, its_cores in enumerate(own):
            if only not in (None, index):
                continue
            with pinned(its_cores):
                worker = await WorkerProcess.start(
                    f"worker {index}",
                    [*words, "--index", str(index)],
                    {
                        **environment(os.environ),
                        "OMP_NUM_THREADS": str(threads),
                    },
                )
            started.append(worker)
        for worker in started:
            await worker.ready()
        yield started
    finally:
        await end_all(started)


@asynccontextmanager
async def comboio(
    model: Path,
    bits: str,
    *,
    count: int = 2,
    streams: int = 8,
    tokens: int,
    name: str = "comboio",
    trace: Any = None,
    **settings: Any,
) -> AsyncIterator[PipelineContestant]:
    """Workers of ours and a pipeline over them; `tokens` is what a stream may grow to."""
    async with workers(model, bits, count=count, **settings) as started:
        addresses = [str(worker.address) for worker in started]
        pipeline = await Pipeline.open(
            addresses,
            model=str(model),
            max_sequences=streams,
            max_tokens_hint=tokens + 1,
            trace=trace,
        )
        async with pipeline:
            yield PipelineContestant(pipeline, name)


# --- llama.cpp --------------------------------------------------------------------------------


class LlamaCpp:
    """llama.cpp's programs, and what they say of their build."""

    def __init__(self, server: ServerProgram, rpc_server: Program) -> None:
        self.server, self.rpc_server = server, rpc_server
        self.remarks: list[str] = []  # on how they had to be started
        self.system_info = ""  # "CPU : ... AVX512 = 1 | ...", once a server has started

    @classmethod
    def find(cls) -> LlamaCpp:
        """In LLAMA_CPP_DIR, else on PATH.

        Raises:
            UsageError: they are not there, or cannot run.
        """
        return cls(find_server(None, os.environ, needs_rpc=True), find_rpc_server(None, os.environ))

    @property
    def warning(self) -> str | None:
        """A sentence where the build leaves instructions of this CPU unused."""
        if not self.system_info:
            return None
        unused = [
            name
            for flag, name in (("avx2", "AVX2"), ("avx512f", "AVX512"), ("asimddp", "DOTPROD"))
            if flag in cpu_flags() and f"{name} = 1" not in self.system_info
        ]
        if not unused:
            return None
        return (
            f"{self.server.path} was built without {' and '.join(unused)}, which this CPU has: "
            "build it here with GGML_NATIVE on, or the comparison flatters us"
        )

    @asynccontextmanager
    async def started(
        self,
        gguf: Path,
        *,
        name: str,
        num_layers: int,
        rpc: int,
        streams: int = 8,
        tokens: int,
        split_mode: str | None = None,
        ubatch_size: int | None = None,
        threads: int = 1,
    ) -> AsyncIterator[LlamaContestant]:
        """A llama-server; with `rpc` rpc-servers, one core and one thread each.

        One that crashes at its start with its kernels for repacked weights runs without them, and
        `remarks` say so.
        """
        settings = ServerSettings(
            model=gguf,
            num_layers=num_layers,
            host="127.0.0.1",
            port=free_port("127.0.0.1"),
            context=tokens + 64,
            parallel=streams,
            tensor_split=[1.0] * rpc if rpc else None,
            split_mode=split_mode,
            ubatch_size=ubatch_size,
            threads=threads,
        )
        async with AsyncExitStack() as stack:
            servers = await stack.enter_async_context(
                rpc_servers_here(self.rpc_server, rpc, threads=1, on_line=_nobody)
            )
            _pin(servers)
            try:
                running = await stack.enter_async_context(self._server(settings, servers))
            except Error as exc:
                if rpc or "SIG" not in str(exc):
                    raise
                self.remarks.append(f"{gguf.name}, {name}: runs with --no-repack, as {exc}")
                settings = replace(settings, more_words=("--no-repack",))
                running = await stack.enter_async_context(self._server(settings, servers))
            yield LlamaContestant(running.url, name)

    def _server(
        self, settings: ServerSettings, servers: RpcServersHere
    ) -> AbstractAsyncContextManager[RunningServer]:
        return llama_server(
            self.server,
            settings,
            servers,
            load_timeout_s=LOAD_TIMEOUT_S,
            on_state=lambda *_: None,
            on_line=self._heard,
        )

    def _heard(self, _: str, line: str) -> None:
        if "system_info" in line:
            self.system_info = line


def _pin(servers: RpcServersHere) -> None:
    """Each has one thread until a llama-server calls; those that it starts inherit its core."""
    for pid, its_cores in zip(servers.pids, cores(len(servers.pids)), strict=True):
        os.sched_setaffinity(pid, its_cores)


def _nobody(*_: str) -> None:
    """Hears their logs."""


def llama_cpp_or_why() -> LlamaCpp | str:
    """llama.cpp, or a sentence on why it is left out."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return "llama.cpp is left out: its model files need the package gguf (pip install gguf)"
    try:
        return LlamaCpp.find()
    except UsageError as exc:
        return f"llama.cpp is left out: {exc}"
