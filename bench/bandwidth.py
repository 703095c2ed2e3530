"""How fast a decode step reads the weights, against what the memory gives one core.

    python bench/bandwidth.py [--bits bf16,int8,int4] [--quick]

Two workers, one core and one thread each; one stream. GB/s are the bytes of the weights that a
worker holds over the time that its torch thread takes for a decode step, attention and everything
else included. The bound is bench/gemv_bound.c in the same run, on one of these cores: a matrix
times a vector in C, which does nothing but read. Both take turns; medians.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.machine import cores, pinned
from bench.measuring.rounds import say
from bench.measuring.shapes import SHAPES, Shape
from bench.measuring.stages import decode_step
from bench.measuring.verdicts import Row, publish, ratio_spread
from manager.bench_load import Load
from proto.errors import Error

TARGETS: Final = {"bf16": 0.85, "int8": 0.8, "int4": 0.7}
PROMPT_TOKENS: Final = 8


def main() -> None:
    parser = command.parser(__doc__, bits=",".join(command.ALL_BITS))
    parser.add_argument("--shape", choices=SHAPES, default="llama", help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a round")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    rounds, steps = (1, 8) if args.quick else (args.rounds, args.steps)
    load = Load()
    rows = [
        asyncio.run(measure(SHAPES[args.shape], it, rounds, steps, load, quick=args.quick))
        for it in bits
    ]
    publish(rows, title="weights read in decode, 1 stream", load=load, json_file=args.json)


async def measure(
    shape: Shape, bits: str, rounds: int, steps: int, load: Load, *, quick: bool
) -> Row:
    """One row; not measured where these bits cannot run."""
    what, case = "weights read in decode, 1 stream", f"{shape.name} {bits}"
    ours, theirs = list[float](), list[float]()
    try:
        async with comboio(checkpoint(shape), bits, streams=1, tokens=256) as contestant:
            for number in range(rounds + 1):
                with load.noted():
                    stages = await decode_step(
                        contestant,
                        prompt_tokens=PROMPT_TOKENS,
                        steps=steps,
                        vocab_size=shape.vocab_size,
                        seed=number,
                    )
                if not number:
                    continue  # it warms up
                read = sum(it.facts.stage_bytes for it in stages)
                ours.append(read / sum(it.compute_s for it in stages) / 1e9)
                theirs.append(await bound(quick=quick))
                say(f"  {case}, round {number}: {ours[-1]:.1f} GB/s, bound {theirs[-1]:.1f}")
    except Error as exc:
        return Row(what, case, "GB/s", None, note=str(exc))
    return Row(
        what,
        case,
        "GB/s",
        statistics.median(ours),
        against="C on one core",
        theirs=statistics.median(theirs),
        target=TARGETS[bits],
        spread=ratio_spread(ours, theirs),
    )


async def bound(*, quick: bool) -> float:
    """GB/s of the product in C, on the first core.

    Raises:
        Error: it cannot be compiled here.
    """
    script = Path(__file__).with_name("kernels.py")
    words = [sys.executable, str(script), "--json", "--only", "bound", "--threads", "1"]
    if quick:
        words += ["--rounds", "1", "--working-set", "0.5"]

    def ask() -> subprocess.CompletedProcess[str]:
        with pinned(cores(1)[0]):
            return subprocess.run(words, capture_output=True, text=True, check=False)

    done = await asyncio.to_thread(ask)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Error(f"the bound cannot be measured (python bench/kernels.py): {last}")
    return float(json.loads(done.stdout)["bound_gb_s"])


if __name__ == "__main__":
    command.run(main)
