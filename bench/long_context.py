"""What 16,000 tokens of context cost a decode step: is KV read at the memory's speed?

    python bench/long_context.py [--tokens 16384] [--layers 4] [--kv-quantize int8] [--quick]

One worker, one core and one thread, one stream, some layers of the 1.1B Llama (all layers are
alike, and the prompt must be computed first). What a step takes at the end of a long prompt less
what it takes at the end of a short one is the time for reading the KV; its bytes over this time are
compared with what C reads on one core in the same run. A copy of the cache in every step would show
here.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bandwidth import bound
from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio
from bench.measuring.rounds import say
from bench.measuring.shapes import SHAPES
from bench.measuring.verdicts import Row, publish
from manager.bench_load import Load
from manager.bench_streams import PipelineContestant, random_prompts

SHORT_TOKENS: Final = 39


def main() -> None:
    parser = command.parser(__doc__, bits="bf16")
    parser.add_argument("--tokens", type=int, default=16384, help="of context")
    parser.add_argument("--layers", type=int, default=4, help="1 to 22")
    parser.add_argument("--steps", type=int, default=48, help="decode steps at each length")
    parser.add_argument("--kv-quantize", choices=("none", "int8"), default="none")
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    if args.quick:
        args.tokens, args.layers, args.steps = min(args.tokens, 4096), 2, 24
    load, rows = Load(), list[Row]()
    for it in bits:
        rows += asyncio.run(
            measure(it, args.kv_quantize, args.tokens, args.layers, args.steps, load, args.quick)
        )
    publish(rows, title=f"context of {args.tokens} tokens", load=load, json_file=args.json)


async def measure(
    bits: str, kv_quantize: str, tokens: int, layers: int, steps: int, load: Load, quick: bool
) -> list[Row]:
    """A step at both lengths, and the speed at which KV was read."""
    shape = SHAPES["llama"].changed(num_layers=layers, max_position_embeddings=tokens + 1024)
    case = f"llama {bits}, {layers} layers"
    if kv_quantize != "none":
        case += f", KV {kv_quantize}"
    async with comboio(
        checkpoint(shape),
        bits,
        count=1,
        streams=1,
        tokens=tokens + steps,
        kv_memory="2G",
        more_words=("--kv-quantize", kv_quantize),
    ) as contestant:
        vocab_size = shape.vocab_size
        with load.noted():
            await _step_s(contestant, SHORT_TOKENS, 4, vocab_size)  # it warms up
            short = await _step_s(contestant, SHORT_TOKENS, steps, vocab_size)
            long = await _step_s(contestant, tokens - steps // 2, steps, vocab_size)
        facts = contestant.pipeline.workers[0]
    kv_bytes = tokens * facts.block_bytes // facts.block_tokens
    is_seen = long > 1.02 * short  # else other work on the machine is all that it shows
    say(f"  {case}: {1e3 * short:.2f} ms a step, {1e3 * long:.2f} ms at {tokens} tokens")
    return [
        Row(f"decode step at {tokens} tokens", case, "ms", 1e3 * long),
        Row(f"decode step at {SHORT_TOKENS} tokens", case, "ms", 1e3 * short),
        Row(
            "KV read in decode, 1 stream",
            case,
            "GB/s",
            kv_bytes / (long - short) / 1e9 if is_seen else None,
            against="C on one core",
            theirs=await bound(quick=quick),
            note="" if is_seen else "the longer context took no longer: the machine is too busy",
        ),
    ]


async def _step_s(
    contestant: PipelineContestant, prompt_tokens: int, steps: int, vocab_size: int
) -> float:
    """Median time between two tokens."""
    prompts = random_prompts(1, prompt_tokens, vocab_size, seed=prompt_tokens)
    run = await contestant.generate(prompts, 1 + steps)
    return statistics.median(run.gaps_s)


if __name__ == "__main__":
    command.run(main)
