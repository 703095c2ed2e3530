"""A model of 3.8e9 parameters for boards of 4 GB: Phi-3.5-mini's config, two workers, 4 bits.

    python bench/board.py [--bits int4] [--kv-quantize int8] [--quick]

Random weights, and rotary factors of the right number but invented values, since those of Phi-3.5
are learnt; one core and one thread a worker; keys and values in 8 bits, unless told otherwise.
Resident memory of each worker when one stream of 2,000 tokens is in its KV, and tokens a second;
the first run packs 7.6 GB, which takes a while.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.rounds import say
from bench.measuring.shapes import SHAPES
from bench.measuring.verdicts import Row, publish
from manager.bench_load import Load
from manager.bench_rounds import words
from manager.bench_streams import random_prompts
from proto.errors import Error

TARGET_GB: Final = 1.7
TOKENS: Final = 2000
NEW_TOKENS: Final = 48


def main() -> None:
    parser = command.parser(__doc__, bits="int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-quantize", choices=("none", "int8"), default="int8")
    parser.add_argument("--shape", choices=SHAPES, default="phi35", help="sizes of the model")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    rounds, load, rows = 1 if args.quick else args.rounds, Load(), list[Row]()
    for it in bits:
        rows += asyncio.run(
            measure(args.shape, it, args.kv_quantize, rounds, load, quick=args.quick)
        )
    publish(rows, title=SHAPES[args.shape].what, load=load, json_file=args.json)


async def measure(
    name: str, bits: str, kv_quantize: str, rounds: int, load: Load, *, quick: bool
) -> list[Row]:
    """Memory of each worker, and tokens a second."""
    shape, case = SHAPES[name], f"{name} {bits}"
    if kv_quantize != "none":
        case += f", KV {kv_quantize}"
    new_tokens = 12 if quick else NEW_TOKENS
    rates, prompt_rates = list[float](), list[float]()
    try:
        async with comboio(
            checkpoint(shape),
            bits,
            streams=1,
            tokens=TOKENS,
            kv_memory="1G",
            more_words=("--kv-quantize", kv_quantize),
        ) as contestant:
            for number in range(rounds):
                prompts = random_prompts(1, TOKENS - new_tokens, shape.vocab_size, seed=number)
                with load.noted():
                    run = await contestant.generate(prompts, new_tokens)
                say(f"  {case}, round {number + 1}: {words(run)}")
                rates.append(run.decode_tokens_per_s or 0.0)
                prompt_rates.append(run.prompt_tokens_per_s)
            status = await contestant.pipeline.status()
    except Error as exc:
        return [Row("resident with 2,000 tokens of KV", case, "GB", None, note=str(exc))]
    rows = [
        Row(
            f"worker {index}, resident with {TOKENS} tokens of KV",
            case,
            "GB",
            it.rss_bytes / 1e9,
            target=TARGET_GB,
            at_most=True,
            note=f"worker {index}: peak {it.peak_rss_bytes / 1e9:.2f} GB, "
            f"stage {facts.stage_bytes / 1e9:.2f} GB, "
            f"KV {TOKENS * facts.block_bytes / facts.block_tokens / 1e9:.2f} GB",
        )
        for index, (facts, it, _) in enumerate(status)
    ]
    spread = (min(rates), max(rates))
    rows.append(Row("1 stream, decode", case, "tokens/s", statistics.median(rates), spread=spread))
    rows.append(Row("prompt", case, "tokens/s", statistics.median(prompt_rates)))
    return rows


if __name__ == "__main__":
    command.run(main)
