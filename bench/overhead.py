"""What a layer costs in a decode step beside its matrices: a model of next to no width.

    python bench/overhead.py [--bits bf16,int8,int4] [--quick]

One worker on one core, one stream, a Llama of hidden size 128. What a step takes with 22 layers
less what it takes with 2, a layer: calls, norms, rotation, and the fixed cost of attention and of
each matrix product, whose own work is next to nothing here. So this is more than the overhead
proper.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.rounds import say
from bench.measuring.shapes import SHAPES
from bench.measuring.stages import decode_step
from bench.measuring.verdicts import Row, publish
from manager.bench_load import Load
from proto.errors import Error

TARGET_US: Final = 100.0
MANY, FEW = 22, 2
WHAT: Final = "step overhead, a layer"


def main() -> None:
    parser = command.parser(__doc__, bits="bf16,int8,int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="decode steps of a round")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    rounds, steps = (1, 50) if args.quick else (args.rounds, args.steps)
    load = Load()
    rows = [asyncio.run(measure(it, rounds, steps, load)) for it in bits]
    publish(rows, title="a decode step without its matrices", load=load, json_file=args.json)


async def measure(bits: str, rounds: int, steps: int, load: Load) -> Row:
    """Microseconds a layer."""
    found = list[float]()
    shapes = {it: SHAPES["narrow"].changed(num_layers=it) for it in (MANY, FEW)}
    models = {it: checkpoint(shape) for it, shape in shapes.items()}
    try:
        async with AsyncExitStack() as stack:
            contestants = {}
            for layers, model in models.items():
                contestants[layers] = await stack.enter_async_context(
                    comboio(model, bits, count=1, streams=1, tokens=512)
                )
            for number in range(rounds + 1):
                taken = {}
                for layers, contestant in contestants.items():
                    with load.noted():
                        (stage,) = await decode_step(
                            contestant,
                            prompt_tokens=8,
                            steps=steps,
                            vocab_size=SHAPES["narrow"].vocab_size,
                            seed=number,
                        )
                    taken[layers] = stage.compute_s
                if number:
                    found.append(1e6 * (taken[MANY] - taken[FEW]) / (MANY - FEW))
                    say(f"  {bits}, round {number}: {found[-1]:.0f} us a layer")
    except Error as exc:
        return Row(WHAT, f"narrow {bits}", "us", None, note=str(exc))
    return Row(
        WHAT,
        f"narrow {bits}",
        "us",
        statistics.median(found),
        target=TARGET_US,
        at_most=True,
        spread=(min(found), max(found)),
    )


if __name__ == "__main__":
    command.run(main)
