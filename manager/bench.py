"""`manager bench`: how fast the pipeline is at several numbers of streams, against others if asked.

Options become a `BenchConfig`; `run` reads like the command does. What a figure means stands in
`manager.bench_streams`, how contestants take turns in `manager.bench_rounds`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from manager import event_loop
from manager.bench_options import BenchConfig, bench_options
from manager.options import LLAMA_SERVER
from manager.output import Notices, describe_worker
from proto.errors import Error

if TYPE_CHECKING:
    from manager.bench_rounds import Runs
    from manager.bench_streams import Contestant, PipelineContestant, Run

OURS: Final = "comboio"


@click.command()
@bench_options
def bench(config: BenchConfig) -> None:
    """Measure tokens a second, latency and busy share at several numbers of streams.

    Prompts are random tokens of exact length, and every stream generates exactly as many new
    ones: what it writes makes no sense, and how fast is all that counts. Exit code 1 when a
    contestant failed.
    """
    event_loop.run(run(config))


async def run(config: BenchConfig) -> None:
    """Open what is measured, let all take turns, show and write what came of it.

    Raises:
        Error: in one sentence; also when a contestant failed, once the others are shown.
    """
    from manager import bench_charts, bench_report
    from manager.bench_load import Load
    from manager.bench_rounds import take_turns

    if config.charts is not None:
        bench_charts.check(config.charts)
    notices, load = Notices(), Load()
    try:
        async with AsyncExitStack() as stack:
            field = await _open(config, stack, notices)
            shown = _Shown(config, len(field.contestants), notices)
            runs = await take_turns(
                field.contestants,
                config.cases,
                rounds=config.rounds,
                vocab_size=field.vocab_size,
                around=load.noted,
                on_run=shown.on_run,
                on_failure=shown.on_failure,
            )
            trace = await _trace(config, field, notices)
    finally:
        notices.clear()
    names = [it.name for it in field.contestants]
    title = f"{field.model}, {config.words}"
    bench_report.print_table(config.cases, names, runs, title)
    for sentence in filter(None, (load.warning, *runs.failures.values())):
        notices.say(f"manager: {sentence}")
    if config.json_file is not None:
        identity = {"model": field.model, "settings": config.as_json()}
        content = bench_report.as_json(runs, load, identity=identity, workers=field.workers)
        bench_report.write_json(config.json_file, content)
    if config.charts is not None:
        _draw(config.charts, runs, title, trace, notices)
    if runs.failures:
        raise Error(f"{', '.join(runs.failures)} could not be measured to the end")


# --- who takes part ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """Everybody, ready."""

    contestants: Sequence[Contestant]
    model: str
    vocab_size: int
    workers: list[dict[str, Any]]
    ours: PipelineContestant | None  # None where a llama-server is measured instead


async def _open(config: BenchConfig, stack: AsyncExitStack, notices: Notices) -> Field:
    """Ours first: it says which model it is, and how many cores each of the others gets."""
    from manager import bench_against
    from manager.bench_llama import LlamaContestant

    if config.connection.backend == LLAMA_SERVER:
        assert config.connection.server is not None
        server = await bench_against.running_server(
            config.connection.server, config.connection.api_key_file, os.environ
        )
        return Field([server], server.name, await server.vocab_size(), [], None)
    ours = await stack.enter_async_context(_ours(config, notices))
    facts = ours.pipeline.workers
    contestants: list[Contestant] = [ours]
    for name in config.against:
        notices.show(f"starting {name}")
        contestants.append(
            await stack.enter_async_context(bench_against.opened(name, config, facts))
        )
    notices.clear()
    # A server that is up may hold another model than ours.
    others = [await it.vocab_size() for it in contestants if isinstance(it, LlamaContestant)]
    held = zip(ours.pipeline.addresses, facts, strict=True)
    return Field(
        contestants,
        ours.pipeline.model_name,
        min(facts[0].vocab_size, *others) if others else facts[0].vocab_size,
        [describe_worker(address, it) for address, it in held],
        ours,
    )


@asynccontextmanager
async def _ours(config: BenchConfig, notices: Notices) -> AsyncIterator[PipelineContestant]:
    from manager.bench_streams import PipelineContestant
    from manager.connection import open_pipeline

    async with open_pipeline(
        config.connection,
        notices,
        max_sequences=max(config.streams),
        max_tokens_hint=config.prompt_tokens + config.new_tokens + 1,
    ) as pipeline:
        yield PipelineContestant(pipeline, OURS)


# --- what is seen -----------------------------------------------------------------------------


class _Shown:
    """How far it is: a moving line on a terminal, a line for every run elsewhere."""

    def __init__(self, config: BenchConfig, num_contestants: int, notices: Notices) -> None:
        self._notices, self._done = notices, 0
        self._total = (config.rounds + 1) * len(config.cases) * num_contestants

    def on_run(self, number: int, name: str, case: str, run: Run | None) -> None:
        from manager.bench_rounds import words

        what = "warm-up" if not number else f"round {number}"
        if run is None:
            self._notices.show(f"{what}: {name}, {case}", self._done, self._total)
            self._done += 1
        else:
            self._notices.say(f"{what}: {name}, {case}: {words(run)}")

    def on_failure(self, name: str, why: str) -> None:
        self._notices.say(f"manager: {name} is left out from here on: {why}")


async def _trace(config: BenchConfig, field: Field, notices: Notices) -> Path | None:
    """One more run of most streams, with a trace for the chart of steps; it is not counted."""
    if config.charts is None or field.ours is None:
        return None
    from manager.bench_streams import record_trace

    notices.show("one more run, with a trace")
    handle, path = tempfile.mkstemp(prefix="comboio-trace-", suffix=".json")
    os.close(handle)
    await record_trace(
        field.ours.pipeline,
        Path(path),
        config.cases[-1],
        secret_file=config.connection.secret_file,
        tls=config.connection.tls,
        model=config.connection.model,
    )
    notices.clear()
    return Path(path)


def _draw(folder: Path, runs: Runs, title: str, trace: Path | None, notices: Notices) -> None:
    from manager import bench_charts

    written = bench_charts.draw_all(folder, runs, title=title)
    if trace is not None:
        written.append(bench_charts.draw_gantt(folder / "steps.png", trace, title=title))
        trace.unlink(missing_ok=True)
    notices.say(f"charts: {', '.join(map(str, written))}")
