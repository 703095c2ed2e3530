"""Start those whom `manager bench` compares our pipeline with, on this machine's cores.

transformers' `generate` in one process with all threads; llama.cpp as llama-server over as many
rpc-servers as we have workers, each with its share of the cores; a llama-server that is up already.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manager.bench_llama import LlamaContestant
from manager.bench_options import LLAMA_CPP, TRANSFORMERS, BenchConfig
from manager.bench_transformers import transformers_process
from proto.cores import cores_each
from proto.errors import UsageError
from proto.messages import WorkerFacts

if TYPE_CHECKING:
    from manager.bench_streams import Contestant

LOAD_TIMEOUT_S: Final = 1800.0
SPARE_TOKENS: Final = 64  # of context, beside prompt and answer
UBATCH_TOKENS: Final = 64  # so that a long prompt goes down the rpc-servers in pieces


@asynccontextmanager
async def opened(
    name: str, config: BenchConfig, workers: Sequence[WorkerFacts]
) -> AsyncIterator[Contestant]:
    """One contestant, for the block.

    Args:
        name: one of `BenchConfig.against`.
        workers: ours, which it is compared with.
    Raises:
        Error: it cannot run here, in one sentence.
    """
    if name == TRANSFORMERS:
        async with transformers_process(
            _model(config, workers[0]),
            threads=cores_each(1),
            dtype=workers[0].dtype,
            device=workers[0].device.split()[0],  # the rest is its name for people
        ) as contestant:
            yield contestant
    elif name == LLAMA_CPP:
        async with _llama_cpp(config, len(workers)) as llama:
            yield llama
    else:
        yield await running_server(name, None, os.environ)


def _model(config: BenchConfig, facts: WorkerFacts) -> str:
    """What transformers loads: the workers' checkpoint, where it can be found."""
    if config.connection.model is not None:
        return config.connection.model
    if facts.model_path:
        return facts.model_path
    from engine.checkpoint_source import DEMO_MODEL

    return str(DEMO_MODEL)


@asynccontextmanager
async def _llama_cpp(config: BenchConfig, num_workers: int) -> AsyncIterator[LlamaContestant]:
    from manager.llama_server.binaries import find_rpc_server, find_server
    from manager.llama_server.command_line import ServerSettings
    from manager.llama_server.gguf_file import read_model
    from manager.llama_server.launch import llama_server
    from manager.llama_server.ports import free_port
    from manager.llama_server.rpc_servers import rpc_servers_here

    assert config.gguf is not None
    model = read_model(config.gguf)
    rpc_servers = num_workers if num_workers > 1 else 0
    program = find_server(None, os.environ, needs_rpc=rpc_servers > 0)
    rpc_program = find_rpc_server(None, os.environ) if rpc_servers else None
    settings = ServerSettings(
        model=config.gguf,
        num_layers=model.num_layers,
        host="127.0.0.1",
        port=free_port("127.0.0.1"),
        context=config.prompt_tokens + config.new_tokens + SPARE_TOKENS,
        parallel=max(config.streams),
        tensor_split=[1.0] * rpc_servers or None,
        ubatch_size=UBATCH_TOKENS if rpc_servers else None,
        threads=cores_each(1),
    )
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(
            rpc_servers_here(
                rpc_program, rpc_servers, threads=cores_each(max(1, rpc_servers)), on_line=_nobody
            )
        )
        running = await stack.enter_async_context(
            llama_server(
                program,
                settings,
                servers,
                load_timeout_s=LOAD_TIMEOUT_S,
                on_state=lambda *_: None,
                on_line=_nobody,
            )
        )
        yield LlamaContestant(running.url, LLAMA_CPP)


async def running_server(
    url: str, api_key_file: Path | None, environ: Mapping[str, str]
) -> LlamaContestant:
    """A llama-server that somebody started.

    Raises:
        Error: it does not answer, or is none.
    """
    from manager.llama_server.api_key import find_api_key
    from manager.llama_server.server_url import parse_server

    try:
        server = parse_server(url)
    except UsageError as exc:
        raise UsageError(str(exc).replace("--server", "--against", 1)) from exc
    contestant = LlamaContestant(
        server, server, api_key=find_api_key(server, api_key_file, environ)
    )
    await contestant.vocab_size()  # it answers
    return contestant


def _nobody(*_: str) -> None:
    """Hears their logs."""
