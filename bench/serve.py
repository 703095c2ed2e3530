"""What HTTP costs: tokens a second and first tokens by `manager serve`, and by the engine alone.

    python bench/serve.py [--model DIR] [--streams 64] [--new-tokens 48] [--rounds 5] [--json]

The same two workers are used by both: by a pipeline in this process, and by a `manager serve` in
a process of its own whose streams are read here over sockets, and only counted. In each round
both take their turn with the same prompts, all at once; medians over the rounds are shown. Without
--model the demo model is used, whose steps are so short that what HTTP costs shows the most. The
workers take one thread each: server, client and workers share the cores, as on one machine they do.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from manager.generation import GenerationOptions, Piece  # noqa: E402 - works from any folder
from manager.pipeline import Pipeline  # noqa: E402
from manager.spawn import SpawnConfig, SpawnedWorkers  # noqa: E402

PROMPT_TOKENS = 32


@click.command(context_settings={"show_default": True})
@click.option("--model", help="Checkpoint folder. Default: the demo model.")
@click.option("--streams", default=64)
@click.option("--new-tokens", default=48)
@click.option("--rounds", default=5)
@click.option("--json", "as_json", is_flag=True)
def main(model: str | None, streams: int, new_tokens: int, rounds: int, as_json: bool) -> None:
    """Measure, and print one table."""
    report = asyncio.run(measure(model, streams, new_tokens, rounds))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"{streams} streams of {new_tokens} tokens")
    for title in ("", "tokens/s", "first token p50, ms"):
        table.add_column(title, justify="right")
    for name in ("engine", "http"):
        row = report[name]
        table.add_row(name, f"{row['tokens_per_s']:.0f}", f"{1000 * row['ttft_s']:.1f}")
    Console().print(table)
    print(
        f"loss {100 * report['loss']:.1f} %, first token +{1000 * report['ttft_growth_s']:.1f} ms"
    )


async def measure(model: str | None, streams: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of both ways."""
    prompts = [[1 + (7 * s + t) % 255 for t in range(PROMPT_TOKENS)] for s in range(streams)]
    async with SpawnedWorkers(SpawnConfig(count=2, model=model, threads=1)) as workers:
        addresses = [str(address) for address in workers.addresses]
        # Its start is waited for before there is a link that wants to be answered.
        with serving(addresses, streams) as port:
            async with await Pipeline.open(addresses, max_sequences=streams) as pipeline:
                ways: dict[str, Any] = {
                    "engine": lambda: directly(pipeline, prompts, new_tokens),
                    "http": lambda: over_http(port, prompts, new_tokens),
                }
                runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
                for number in range(rounds + 1):
                    for name in sorted(ways, reverse=bool(number % 2)):
                        result = await ways[name]()
                        if number:  # the first round warms up
                            runs[name].append(result)
    report: dict[str, Any] = {
        name: {
            "tokens_per_s": statistics.median(rate for rate, _ in found),
            "ttft_s": statistics.median(ttft for _, ttft in found),
        }
        for name, found in runs.items()
    }
    report["loss"] = 1 - report["http"]["tokens_per_s"] / report["engine"]["tokens_per_s"]
    report["ttft_growth_s"] = report["http"]["ttft_s"] - report["engine"]["ttft_s"]
    return report


async def directly(
    pipeline: Pipeline, prompts: list[list[int]], new_tokens: int
) -> tuple[float, float]:
    """(tokens/s, median time to the first token) of the pipeline itself."""
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)

    async def one(prompt: list[int]) -> float:
        first = 0.0

        def came(piece: Piece) -> None:
            nonlocal first
            if piece.token_ids and not first:
                first = time.monotonic()

        await pipeline.generate(prompt, options, on_piece=came)
        return first

    started = time.monotonic()
    firsts = await asyncio.gather(*map(one, prompts))
    took = time.monotonic() - started
    return len(prompts) * new_tokens / took, statistics.median(firsts) - started


async def over_http(port: int, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """The same through the server."""

    async def one(prompt: list[int]) -> tuple[float, int]:
        body = json.dumps(
            {
                "prompt": prompt,
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}"
        writer.write(head.encode() + b"\r\nconnection: close\r\n\r\n" + body)
        first, last = 0.0, b""
        while data := await reader.read(65536):
            if not first and b"data: " in data:
                first = time.monotonic()
            last = (last + data)[-400:]
        writer.close()
        found = re.search(rb'"completion_tokens":(\d+)', last)
        assert found, last
        return first, int(found[1])

    started = time.monotonic()
    results = await asyncio.gather(*map(one, prompts))
    took = time.monotonic() - started
    assert all(tokens == new_tokens for _, tokens in results)
    return len(prompts) * new_tokens / took, statistics.median(it[0] for it in results) - started


@contextmanager
def serving(addresses: list[str], streams: int) -> Iterator[int]:
    """The port of a server over these workers."""
    words = [sys.executable, "-m", "manager", "serve", "--port", "0"]
    words += ["--workers", ",".join(addresses), "--max-concurrent", str(streams)]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.match(r"ready http://127\.0\.0\.1:(\d+) ", line)
            assert found, f"the server did not start: {line!r}"
            yield int(found[1])
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
