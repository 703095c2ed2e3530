"""Tokens a second on one GPU: two workers that share it, one worker, and transformers.

    python bench/gpu.py [--shapes llama,llama8b] [--streams 1,8,64] [--quick]

Random weights of a 1.1B and an 8B Llama in bfloat16 and 4 bits, against transformers' `generate`
and its continuous batching in bfloat16. Without a GPU it says so and measures nothing. One process
at a time holds weights that large: contestants come one after the other, not in turns.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.rounds import say, turns
from bench.measuring.shapes import SHAPES, Shape
from bench.measuring.verdicts import Row, publish, ratio_spread
from manager.bench_load import Load
from manager.bench_rounds import Case, Runs
from manager.bench_transformers import CONTINUOUS, transformers_process
from proto.errors import Error

FIGURE: Final = "tokens_per_s"
PROMPT_TOKENS, NEW_TOKENS = 39, 128
OURS: Final = {
    "2 workers bf16": (2, "bf16"),
    "1 worker bf16": (1, "bf16"),
    "2 workers int4": (2, "int4"),
    "1 worker int4": (1, "int4"),
}
GENERATE, BATCHING = "generate", "continuous batching"


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", default="llama,llama8b", help="sizes of the models")
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    args = parser.parse_args()
    shapes = [SHAPES[it] for it in command.listed(args.shapes, tuple(SHAPES), "--shapes")]
    cases = [
        Case(f"{count} streams", int(count), PROMPT_TOKENS, 16 if args.quick else NEW_TOKENS)
        for count in args.streams.split(",")
    ]
    load, notes, rows = Load(), list[str](), list[Row]()
    found = dict[str, Any]()
    if args.device.startswith("cuda") and not has_gpu():
        notes.append("there is no GPU here: tokens a second on one were not measured")
        shapes = []
    for shape in shapes:
        rounds = 1 if args.quick else args.rounds
        runs = asyncio.run(measure(shape, cases, rounds, args.device, load))
        found[shape.name] = runs.as_json()
        rows += judge(shape, cases, runs)
        notes += [f"{shape.name}: {name}: {why}" for name, why in runs.failures.items()]
    publish(
        rows, title="tokens/s on one GPU", load=load, json_file=args.json, notes=notes, runs=found
    )


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


async def measure(shape: Shape, cases: list[Case], rounds: int, device: str, load: Load) -> Runs:
    """All contestants, one after the other."""
    model = checkpoint(shape)
    most = max(it.streams for it in cases)
    runs = Runs()
    # Its cache takes most of the memory there is: of a GPU's own, that is, and not of the machine.
    others = (GENERATE, BATCHING) if device.startswith("cuda") else (GENERATE,)
    for name in (*OURS, *others):
        say(f"{shape.name}: {name}")
        try:
            async with _starting(name, model, most, device) as contestant:
                one = await turns(
                    [contestant], cases, rounds=rounds, vocab_size=shape.vocab_size, load=load
                )
        except Error as exc:
            runs.failures[name] = str(exc)
            continue
        runs.found |= one.found
        runs.failures |= one.failures
    return runs


def _starting(
    name: str, model: Path, streams: int, device: str
) -> AbstractAsyncContextManager[Any]:
    if name in OURS:
        count, bits = OURS[name]
        return comboio(
            model,
            bits,
            count=count,
            streams=streams,
            tokens=PROMPT_TOKENS + NEW_TOKENS,
            name=name,
            kv_memory="6G",
            more_words=("--device", device),
        )
    return transformers_process(
        str(model),
        threads=1,
        dtype="bfloat16",
        device=device,
        name=name,
        **({"way": CONTINUOUS} if name == BATCHING else {}),
    )


def judge(shape: Shape, cases: list[Case], runs: Runs) -> list[Row]:
    """Each of ours against the better way of transformers."""
    rows = []
    for case in cases:
        theirs = {it: runs.median(case.name, it, FIGURE) for it in (GENERATE, BATCHING)}
        known = {it: value for it, value in theirs.items() if value is not None}
        best = max(known, key=lambda it: known[it], default="")
        for name in OURS:
            rows.append(
                Row(
                    f"{case.name}, {name}",
                    shape.name,
                    "tokens/s",
                    runs.median(case.name, name, FIGURE),
                    against=best,
                    theirs=known.get(best),
                    spread=ratio_spread(
                        runs.values(case.name, name, FIGURE), runs.values(case.name, best, FIGURE)
                    ),
                    note=runs.failures.get(name, ""),
                )
            )
    return rows


if __name__ == "__main__":
    command.run(main)
