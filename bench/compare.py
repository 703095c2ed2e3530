"""Tokens a second over two workers, against llama.cpp split and whole, and against transformers.

    python bench/compare.py [--shape llama|phi3|gpt2|moe] [--bits bf16,int8,int4] [--quick]

Contestants, all on the same two cores, with the very same random weights:

- comboio: two workers, one core and one thread each, and the manager in this process;
- layer, tensor: llama-server over two rpc-servers, one core and one thread each, `-sm layer -ub 64`
  (the fastest for prompts) and `-sm tensor`;
- whole: one llama-server with both cores and no split;
- transformers: `generate` in bfloat16 with two threads.

Those that hold weights of the same bits are loaded side by side and take turns. llama.cpp takes
part where LLAMA_CPP_DIR or PATH has its programs. How figures are defined stands in
manager/bench_streams.py; how one measures, in bench/README.md.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.charts import draw_comparison, trace_file
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import LlamaCpp, comboio, llama_cpp_or_why
from bench.measuring.ggufs import gguf_file
from bench.measuring.rounds import say, turns
from bench.measuring.shapes import SHAPES, Shape
from bench.measuring.verdicts import Row, publish, ratio_spread
from manager import bench_charts
from manager.bench_load import Load
from manager.bench_rounds import Case, Runs
from manager.bench_streams import Contestant, PipelineContestant, record_trace
from manager.bench_transformers import transformers_process
from proto.errors import Error

OURS: Final = "comboio"
PROMPT_TOKENS: Final = 39
ONE, EIGHT, PROMPT = "1 stream", "8 streams", "prompt of 512"
TWO, FOUR = "2 streams", "4 streams"  # for the chart alone
CASES: Final = (
    Case(ONE, 1, PROMPT_TOKENS, 64),
    Case(TWO, 2, PROMPT_TOKENS, 64, rounds=1),
    Case(FOUR, 4, PROMPT_TOKENS, 64, rounds=1),
    Case(EIGHT, 8, PROMPT_TOKENS, 64),
    Case(PROMPT, 1, 512, 1),
)
# Who takes part in what: no time goes into what no row and no chart needs.
PLAYS: Final = {
    OURS: (ONE, TWO, FOUR, EIGHT, PROMPT),
    "layer": (ONE, TWO, FOUR, EIGHT, PROMPT),
    "tensor": (EIGHT,),
    "whole": (ONE, TWO, FOUR, EIGHT),
    "transformers": (ONE, EIGHT),
}
DECODE, WALL, READ = "decode_tokens_per_s", "tokens_per_s", "prompt_tokens_per_s"


def main() -> None:
    parser = command.parser(__doc__, bits=",".join(command.ALL_BITS))
    parser.add_argument("--shape", choices=SHAPES, default="llama", help="sizes of the model")
    parser.add_argument("--against", default=",".join(tuple(PLAYS)[1:]), help="contestants")
    parser.add_argument("--rounds", type=int, default=3, help="beside the one that warms up")
    parser.add_argument("--streams", default="1,2,4,8", help="1,8 leaves out the chart's points")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="write PNG charts there")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    against = command.listed(args.against, tuple(PLAYS)[1:], "--against")
    cases = [it for it in CASES if str(it.streams) in args.streams.split(",")]
    if args.quick:
        args.rounds = 1
        cases = [_shorter(it) for it in cases if it.name not in (TWO, FOUR)]
    load = Load()
    if args.charts is not None:
        bench_charts.check(args.charts)
    rows, notes, runs = asyncio.run(
        compare(SHAPES[args.shape], bits, against, cases, args.rounds, load, args.charts)
    )
    if args.charts is not None:
        notes += draw_comparison(args.charts, args.shape, runs)
    title = f"{SHAPES[args.shape].what}; rounds: {args.rounds} (lowest to highest ratio)"
    publish(
        rows,
        title=title,
        load=load,
        json_file=args.json,
        notes=notes,
        runs={it: found.as_json() for it, found in runs.items()},
    )


def _shorter(case: Case) -> Case:
    if case.name == PROMPT:
        return case
    return replace(case, new_tokens=12)


async def compare(
    shape: Shape,
    bits: Sequence[str],
    against: Sequence[str],
    cases: Sequence[Case],
    rounds: int,
    load: Load,
    charts: Path | None = None,
) -> tuple[list[Row], list[str], dict[str, Runs]]:
    """Rows, remarks, and all runs by bits."""
    llama, notes = llama_cpp_or_why(), list[str]()
    if isinstance(llama, str):
        if set(against) - {"transformers"}:
            notes.append(llama)
        against = [it for it in against if it == "transformers"]
    rows, found = list[Row](), dict[str, Runs]()
    for it in bits:
        say(f"{shape.name} {it}")
        trace = None if charts is None else trace_file(charts, shape.name, it)
        runs = await _measure(shape, it, against, cases, rounds, load, llama, trace)
        found[it] = runs
        rows += judge(shape, it, runs)
        notes += [f"{shape.name} {it}: {name}: {why}" for name, why in runs.failures.items()]
    if isinstance(llama, LlamaCpp):
        notes += [*llama.remarks, *([llama.warning] if llama.warning else [])]
    return rows, notes, found


async def _measure(
    shape: Shape,
    bits: str,
    against: Sequence[str],
    cases: Sequence[Case],
    rounds: int,
    load: Load,
    llama: LlamaCpp | str,
    trace: Path | None,
) -> Runs:
    """Everybody who holds weights of these bits."""
    # Before anything runs: writing them would keep this process from answering its workers.
    model = checkpoint(shape)
    gguf = gguf_file(shape, bits) if isinstance(llama, LlamaCpp) else None
    room = {"streams": 8, "tokens": max(it.prompt_tokens + it.new_tokens for it in cases)}
    failures: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        contestants: list[Contestant] = []

        async def add(name: str, starting: Any) -> None:
            say(f"  starting {name}")
            try:
                contestants.append(await stack.enter_async_context(starting))
            except Error as exc:
                failures[name] = str(exc)
                say(f"  {name} cannot start: {exc}")

        await add(OURS, comboio(model, bits, name=OURS, **room))
        if isinstance(llama, LlamaCpp):
            its: dict[str, Any] = {"num_layers": shape.num_layers, "gguf": gguf, **room}
            settings: dict[str, dict[str, Any]] = {
                "layer": {"rpc": 2, "split_mode": "layer", "ubatch_size": 64},
                "tensor": {"rpc": 2, "split_mode": "tensor"},
                "whole": {"rpc": 0, "threads": 2},
            }
            for name in settings:
                if name in against:
                    await add(name, llama.started(name=name, **settings[name], **its))
        if "transformers" in against and bits == "bf16":
            await add("transformers", transformers_process(str(model), threads=2, dtype="bfloat16"))
        runs = await turns(
            contestants, cases, plays=PLAYS, rounds=rounds, vocab_size=shape.vocab_size, load=load
        )
        ours = next((it for it in contestants if isinstance(it, PipelineContestant)), None)
        if trace is not None and ours is not None and OURS not in runs.failures:
            eight = next(it for it in cases if it.name == EIGHT)
            await record_trace(ours.pipeline, trace, eight, model=str(model))
    runs.failures = {**failures, **runs.failures}
    return runs


# --- the table --------------------------------------------------------------------------------

Judged = tuple[str, str, str, tuple[str, ...], float]  # what, case, figure, against, target
TARGETS: Final[dict[str, tuple[Judged, ...]]] = {
    bits: (
        ("1 stream, decode", ONE, DECODE, ("layer",), one),
        ("8 streams, decode", EIGHT, DECODE, ("layer",), 2.5),
        ("8 streams, wall clock", EIGHT, WALL, ("layer", "tensor"), 2.2),
        ("8 streams, decode", EIGHT, DECODE, ("whole",), 1.2),
        ("prompt of 512 tokens", PROMPT, READ, ("layer",), 1.2),
    )
    for bits, one in (("bf16", 1.0), ("int8", 1.3), ("int4", 1.5))
}
OF_TRANSFORMERS: Final[tuple[Judged, ...]] = (
    ("1 stream, decode", ONE, DECODE, ("transformers",), 4.0),
    ("8 streams, decode", EIGHT, DECODE, ("transformers",), 2.0),
)


def judge(shape: Shape, bits: str, runs: Runs) -> list[Row]:
    """The rows of these bits; those without anything to compare with show our figure alone."""
    judged = TARGETS[bits] + (OF_TRANSFORMERS if bits == "bf16" else ())
    rows = []
    for what, case, figure, against, target in judged:
        ours = runs.median(case, OURS, figure)
        present = {it: runs.median(case, it, figure) for it in against}
        measured = {it: value for it, value in present.items() if value is not None}
        best = max(measured, key=lambda it: measured[it], default=None)
        if best is None:
            continue
        why = runs.failures.get(OURS, "") if ours is None else ""
        rows.append(
            Row(
                what=what,
                case=f"{shape.name} {bits}",
                unit="tokens/s",
                ours=ours,
                against=best,
                theirs=measured[best],
                target=target,
                spread=ratio_spread(
                    runs.values(case, OURS, figure), runs.values(case, best, figure)
                ),
                note=why,
            )
        )
    if not rows and runs.median(ONE, OURS, DECODE) is not None:
        rows = [
            Row(what, f"{shape.name} {bits}", "tokens/s", runs.median(case, OURS, figure))
            for what, case, figure in (
                ("1 stream, decode", ONE, DECODE),
                ("8 streams, decode", EIGHT, DECODE),
                ("8 streams, wall clock", EIGHT, WALL),
                ("prompt of 512 tokens", PROMPT, READ),
            )
        ]
    return rows


if __name__ == "__main__":
    command.run(main)
