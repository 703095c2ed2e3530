"""Does a long prompt keep two stages busy at once? Two workers against one with all layers.

    python bench/prefill.py [--bits bf16,int8,int4] [--tokens 2048] [--quick]

One stream, one core and one thread a worker. One worker that holds all layers does the work of both
stages one after the other; two workers take the chunks of the prompt in turns. The ratio of the two
times is 2 where they overlap perfectly.

The cut is even for decoding, which reads the lm_head at every step; a prompt needs that once, so
the first stage has more to do. With n chunks it is busy for n of n + 1 turns, or a little more: its
busy share says how near that is.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.rounds import say, turns
from bench.measuring.shapes import SHAPES, Shape
from bench.measuring.verdicts import Row, publish, ratio_spread
from manager.bench_load import Load
from manager.bench_rounds import Case, Runs
from proto.errors import Error

TARGET: Final = 1.8
TWO, ONE, CASE = "two workers", "one worker", "prompt"
FIGURE: Final = "prompt_tokens_per_s"


def main() -> None:
    parser = command.parser(__doc__, bits="bf16,int8,int4")
    parser.add_argument("--shape", choices=SHAPES, default="llama", help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    if args.quick:
        args.rounds, args.tokens = 1, min(args.tokens, 1024)
    load, rows, runs = Load(), list[Row](), dict[str, Runs]()
    for it in bits:
        say(f"{args.shape} {it}")
        row, found = asyncio.run(measure(SHAPES[args.shape], it, args.tokens, args.rounds, load))
        rows.append(row)
        if found is not None:
            runs[it] = found
    publish(
        rows,
        title=f"a prompt of {args.tokens} tokens over 2 stages",
        load=load,
        json_file=args.json,
        runs={it: found.as_json() for it, found in runs.items()},
    )


async def measure(
    shape: Shape, bits: str, tokens: int, rounds: int, load: Load
) -> tuple[Row, Runs | None]:
    """One row, and its runs."""
    what, case = f"prefill of {tokens} over 2 stages", f"{shape.name} {bits}"
    try:
        async with AsyncExitStack() as stack:
            contestants = [
                await stack.enter_async_context(
                    comboio(
                        checkpoint(shape), bits, count=count, streams=1, tokens=tokens + 1,
                        name=name,
                    )
                )
                for name, count in ((TWO, 2), (ONE, 1))
            ]  # fmt: skip
            runs = await turns(
                contestants,
                [Case(CASE, 1, tokens, 1)],
                rounds=rounds,
                vocab_size=shape.vocab_size,
                load=load,
            )
    except Error as exc:
        return Row(what, case, "tokens/s", None, note=str(exc)), None
    row = Row(
        what,
        case,
        "tokens/s",
        runs.median(CASE, TWO, FIGURE),
        against="1 stage x 2",
        theirs=runs.median(CASE, ONE, FIGURE),
        target=TARGET,
        spread=ratio_spread(runs.values(CASE, TWO, FIGURE), runs.values(CASE, ONE, FIGURE)),
        note="; ".join(runs.failures.values()),
    )
    say(f"  {case}: stages busy {', '.join(f'{100 * it:.0f} %' for it in runs.busy(CASE, TWO))}")
    return row, runs


if __name__ == "__main__":
    command.run(main)
