"""Tokens a second over one worker and over two, for 1 to 8 streams, against transformers.

    python bench/pipeline.py [--model DIR] [--new-tokens 32] [--rounds 3] [--streams 1,2] [--json]

Without --model a random float32 Llama of 400 MB is made in a temporary folder: 8 layers of width
1024. Every process computes on one thread (`--threads 1`, `torch.set_num_threads(1)`): over two
workers two cores work, over one worker and in transformers one. transformers runs `generate` on
the same prompts as one batch, in a process of its own. In each round every configuration takes
its turn, so that a machine that slows down slows all of them; medians over the rounds are shown.
tokens/s counts generated tokens over the whole time, the prompts' included. "busy" is the share of
that time in which a worker's torch thread computed.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from manager.generation import GenerationOptions  # noqa: E402 - works from any folder
from manager.metrics import Measurement  # noqa: E402
from manager.pipeline import Pipeline  # noqa: E402
from manager.spawn import SpawnConfig, SpawnedWorkers  # noqa: E402
from tests.support.sibling import save_sibling  # noqa: E402

PROMPT_TOKENS = 32

# Answers each line "STREAMS NEW_TOKENS" with the seconds that `generate` took.
_TRANSFORMERS = """
import sys, time, torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
print("ready", flush=True)
for line in sys.stdin:
    streams, new_tokens = map(int, line.split())
    ids = torch.tensor([[1 + (7 * s + t) % 255 for t in range(PROMPT)] for s in range(streams)])
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                   min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
    print(time.perf_counter() - started, flush=True)
""".replace("PROMPT", str(PROMPT_TOKENS))


@click.command()
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="A checkpoint folder.")
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--streams", default="1,2,4,8", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(model: str | None, new_tokens: int, rounds: int, streams: str, as_json: bool) -> None:
    """Measure, and print medians."""
    counts = [int(count) for count in streams.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = model or str(save_sibling(Path(folder)))
        figures = asyncio.run(measure(path, counts, new_tokens, rounds))
    figures |= {"new_tokens": new_tokens, "rounds": rounds, "load": os.getloadavg()[0]}
    if as_json:
        click.echo(json.dumps(figures))
        return
    table = Table("streams", "transformers", "1 worker", "2 workers", "busy", title="tokens/s")
    for count in counts:
        row = figures["streams"][str(count)]
        busy = ", ".join(f"{100 * share:.0f} %" for share in row["busy"])
        rates = [f"{row[name]:.1f}" for name in ("transformers", "1", "2")]
        table.add_row(str(count), *rates, busy)
    Console().print(table)
    Console().print(f"load average {figures['load']:.1f} on {os.cpu_count()} cores")


async def measure(model: str, counts: list[int], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, by streams."""
    rates: dict[tuple[int, str], list[float]] = {}
    busy: dict[int, list[list[float]]] = {count: [] for count in counts}
    with transformers_process(model) as reference:
        async with (
            SpawnedWorkers(SpawnConfig(count=1, model=model, threads=1)) as one,
            SpawnedWorkers(SpawnConfig(count=2, model=model, threads=1)) as two,
        ):
            for number in range(rounds + 1):  # the first one warms up
                for count in counts:
                    seconds = ask(reference, count, new_tokens)
                    single = await run(one, count, new_tokens)
                    double = await run(two, count, new_tokens)
                    if number:
                        tokens = count * new_tokens
                        rates.setdefault((count, "transformers"), []).append(tokens / seconds)
                        rates.setdefault((count, "1"), []).append(single["tokens_per_s"])
                        rates.setdefault((count, "2"), []).append(double["tokens_per_s"])
                        busy[count].append([it["busy_share"] for it in double["workers"]])
    names = ("transformers", "1", "2")
    return {
        "streams": {
            str(count): {name: statistics.median(rates[count, name]) for name in names}
            | {"busy": [statistics.median(shares) for shares in zip(*busy[count], strict=True)]}
            for count in counts
        }
    }


async def run(workers: SpawnedWorkers, streams: int, new_tokens: int) -> dict[str, Any]:
    """So many streams at once over these workers."""
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
    pipeline = await Pipeline.open([str(it) for it in workers.addresses], max_sequences=streams)
    async with pipeline:
        measurement = Measurement(pipeline)
        await measurement.start()
        completions = await asyncio.gather(
            *(
                pipeline.generate([1 + (7 * s + t) % 255 for t in range(PROMPT_TOKENS)], options)
                for s in range(streams)
            )
        )
        await measurement.stop()
        for completion in completions:
            assert completion.completion_tokens == new_tokens, completion
            measurement.requests.add(completion)
        return measurement.report()


@contextmanager
def transformers_process(model: str) -> Iterator[subprocess.Popen[str]]:
    """The model whole, in a process that is fed lines."""
    with ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-c", _TRANSFORMERS, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise click.ClickException("transformers did not load the model; see above")
        yield process


def ask(process: subprocess.Popen[str], streams: int, new_tokens: int) -> float:
    """Seconds of one `generate`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{streams} {new_tokens}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


if __name__ == "__main__":
    main()
