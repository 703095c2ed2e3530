"""How long a worker takes until it is ready, what packing costs, and how much memory it peaks at.

    python bench/starting.py [--bits bf16,int8,int4] [--quick]

- start: worker 0 of 2, from its start to its ready line, against reading as many bytes of the same
  file (`head -c`, from the page cache) plus importing torch and transformers. Quantized weights are
  in the worker's cache, as in every start but the first.
- packing: what a start takes longer when it packs (`--no-cache`) than when it holds the weights as
  they are, per GB of the checkpoint's 16-bit bytes.
- memory: the peak of each of two workers since it started, packing included and 8 streams of 104
  tokens behind it, less the bytes of its stage and of its KV. The larger one is shown.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring import command
from bench.measuring.checkpoints import checkpoint
from bench.measuring.contestants import comboio, workers
from bench.measuring.machine import cores, pinned
from bench.measuring.rounds import say
from bench.measuring.shapes import SHAPES, Shape
from bench.measuring.verdicts import Row, publish, ratio_spread
from manager.bench_load import Load
from manager.bench_streams import random_prompts
from proto.errors import Error

START_TARGET, PACKING_TARGET, MEMORY_TARGET = 1.5, 2.0, 400.0
STREAMS, PROMPT_TOKENS, NEW_TOKENS = 8, 39, 64
NO_CACHE: Final = ("--no-cache",)
# torch, transformers and the model's class, left to themselves; a worker imports less of them.
IMPORT: Final = """
import sys, worker.service, worker.loading, engine.stage_loading
from engine.architecture import read_architecture
from engine.checkpoint import Checkpoint
read_architecture(Checkpoint(sys.argv[1])).model_class
"""


def main() -> None:
    parser = command.parser(__doc__, bits="bf16,int8,int4")
    parser.add_argument("--shape", choices=SHAPES, default="llama", help="sizes of the model")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    bits = command.listed(args.bits, command.ALL_BITS, "--bits")
    rounds, load, shape = 1 if args.quick else args.rounds, Load(), SHAPES[args.shape]
    rows = asyncio.run(starts(shape, bits, rounds, load))
    for it in bits:
        rows.append(asyncio.run(memory(shape, it, load)))
    publish(rows, title="start and memory of a worker", load=load, json_file=args.json)


# --- time -------------------------------------------------------------------------------------


async def starts(shape: Shape, bits: list[str], rounds: int, load: Load) -> list[Row]:
    """Rows of starting and of packing; every way to start takes its turn in each round."""
    model = checkpoint(shape)
    read_bytes, failures = 0, dict[str, str]()
    ways = [("bf16", False), *((it, pack) for it in bits if it != "bf16" for pack in (True, False))]
    taken: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    floors: list[float] = []
    for number in range(rounds + 1):
        for name, packs in ways:
            if name in failures:
                continue
            try:
                with load.noted():
                    seconds, read_now = await start(model, name, NO_CACHE if packs else ())
            except Error as exc:
                failures[name] = str(exc)
                continue
            if name == "bf16":
                read_bytes = read_now
            if number:
                taken[name, packs].append(seconds)
                say(f"  {name}{' packing' if packs else ''}: ready after {seconds:.2f} s")
        if number and read_bytes:
            floors.append(await asyncio.to_thread(floor, model, read_bytes))
            say(f"  reading and importing: {floors[-1]:.2f} s")
    rows = []
    for it in bits:
        rows.append(_start_row(shape, it, taken[it, False], floors, failures.get(it, "")))
    as_it_is = taken["bf16", False]
    for it in bits:
        if taken.get((it, True)) and as_it_is:
            more_s = statistics.median(taken[it, True]) - statistics.median(as_it_is)
            rows.append(
                Row(
                    f"packing to {it}",
                    f"{shape.name} {it}",
                    "s/GB",
                    max(0.0, more_s) / (read_bytes / 1e9),
                    target=PACKING_TARGET if it == "int4" else None,
                    at_most=True,
                )
            )
    return rows


def _start_row(shape: Shape, bits: str, taken: list[float], floors: list[float], why: str) -> Row:
    return Row(
        "worker start to ready",
        f"{shape.name} {bits}",
        "s",
        statistics.median(taken) if taken else None,
        against="read + import",
        theirs=statistics.median(floors) if floors else None,
        target=START_TARGET,
        at_most=True,
        spread=ratio_spread(taken, floors),
        note=why,
    )


async def start(model: Path, bits: str, more_words: tuple[str, ...]) -> tuple[float, int]:
    """Seconds until worker 0 of 2 is ready, and the bytes that it says it holds."""
    begun_s = time.monotonic()
    async with workers(model, bits, count=2, only=0, more_words=more_words) as (worker,):
        seconds = time.monotonic() - begun_s
        return seconds, int(worker.ready_line.rpartition(" ")[2])


def floor(model: Path, num_bytes: int) -> float:
    """Seconds of reading so many bytes and of importing, on the worker's core."""
    begun_s = time.monotonic()
    root = Path(__file__).resolve().parents[1]
    with pinned(cores(1)[0]):
        weights = str(model / "model.safetensors")
        subprocess.run(
            ["head", "-c", str(num_bytes), weights], check=True, stdout=subprocess.DEVNULL
        )
        subprocess.run([sys.executable, "-c", IMPORT, str(model)], check=True, cwd=root)
    return time.monotonic() - begun_s


# --- memory -----------------------------------------------------------------------------------


async def memory(shape: Shape, bits: str, load: Load) -> Row:
    """What the larger worker's peak has above its stage and KV."""
    what, case = "peak memory above stage + KV", f"{shape.name} {bits}"
    more_words = () if bits == "bf16" else NO_CACHE
    tokens = PROMPT_TOKENS + NEW_TOKENS + 1
    try:
        async with comboio(
            checkpoint(shape), bits, streams=STREAMS, tokens=tokens, more_words=more_words
        ) as contestant:
            prompts = random_prompts(STREAMS, PROMPT_TOKENS, shape.vocab_size, seed=0)
            with load.noted():
                await contestant.generate(prompts, NEW_TOKENS)
            status = await contestant.pipeline.status()
    except Error as exc:
        return Row(what, case, "MB", None, note=str(exc))
    above = []
    for facts, it, _ in status:
        kv = STREAMS * -(-tokens // facts.block_tokens) * facts.block_bytes
        above.append((it.peak_rss_bytes - facts.stage_bytes - kv) / 1e6)
        say(
            f"  {case}: peak {it.peak_rss_bytes / 1e6:.0f} MB, now {it.rss_bytes / 1e6:.0f}, stage "
            f"{facts.stage_bytes / 1e6:.0f}, KV {kv / 1e6:.0f}"
        )
    return Row(what, case, "MB", max(above), target=MEMORY_TARGET, at_most=True)


if __name__ == "__main__":
    command.run(main)
