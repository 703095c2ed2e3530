"""Mixed requests for some minutes while workers are killed: does one fail, does memory grow?

    python bench/soak.py [--minutes 10] [--streams 6] [--every 3] [--json]

Three sections of a tiny random model on this machine and a spare of each, every worker a process of
its own. `--streams` lanes take requests of many kinds, one after the other: greedy and sampled,
short and long prompts, penalties, readers that go away in the middle. About every `--every` seconds
a worker gets SIGKILL, or now and then SIGSTOP for a moment, and is started again at once. The first
section's worker is left alone, so that its memory is seen over the whole time.

Every text is compared with what it was before the first kill; one that differs, or ends with an
error, counts as failed, and then the exit code is 1. Memory is RSS, sampled twice a second; its
slope is that of the line of least squares through the samples of the last two thirds, in MB a
minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from manager.generation import GenerationOptions  # noqa: E402 - works from any folder
from manager.pipeline import Pipeline  # noqa: E402
from manager.recovery import RecoverySettings  # noqa: E402
from tests.support.chains import save_tiny_with_tokenizer  # noqa: E402
from tests.support.fleet import SECTIONS, Asked, Fleet, Heard, ask_all  # noqa: E402
from tests.support.forked_workers import Nursery  # noqa: E402

PATIENCE: Final = RecoverySettings(timeout_s=120, resplit_after_s=None)
SAMPLE_EVERY_S: Final = 0.5
FREEZE_S: Final = 1.5
MB: Final = 1e6


@dataclass
class Figures:
    """What happened."""

    requests: int = 0
    tokens: int = 0
    cancelled: int = 0
    failed: int = 0
    kills: int = 0
    freezes: int = 0
    errors: list[str] = field(default_factory=list)  # the first few
    manager_mb: list[tuple[float, float]] = field(default_factory=list)  # (minutes, RSS)
    worker_mb: list[tuple[float, float]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Counts and slopes."""
        counts = ("requests", "tokens", "cancelled", "failed", "kills", "freezes", "errors")
        return {name: getattr(self, name) for name in counts} | {
            f"{who}_mb": {
                "last": samples[-1][1],
                "slope_per_minute": slope(samples[len(samples) // 3 :]),
            }
            for who, samples in (("manager", self.manager_mb), ("worker", self.worker_mb))
        }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line of least squares."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--streams", default=6, show_default=True)
@click.option("--every", default=3.0, show_default=True, help="Seconds between kills, on average.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def main(minutes: float, streams: int, every: float, seed: int, as_json: bool) -> None:
    """Run for so long, and say how it went."""
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        tiny = save_tiny_with_tokenizer(Path(folder), max_position_embeddings=4096)
        fleet = Fleet(nursery, tiny.folder, "64MB")
        found = asyncio.run(soak(fleet, 60 * minutes, streams, every, seed)).as_json()
    found["load"] = os.getloadavg()[0]
    if as_json:
        click.echo(json.dumps(found))
    else:
        for name, value in found.items():
            click.echo(f"{name}: {value}")
    sys.exit(1 if found["failed"] else 0)


def pool() -> list[Asked]:
    """Requests of many kinds."""

    def prompt(length: int) -> list[int]:
        return [10 + (7 * at * at + 13 * length) % 250 for at in range(length)]

    def options(new_tokens: int, **more: Any) -> GenerationOptions:
        return GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True, **more)

    return [
        *(Asked(prompt(length), options(20)) for length in (1, 15, 16, 17, 60, 300, 900)),
        *(Asked(prompt(length), options(60, temperature=1.1, seed=length)) for length in (3, 50)),
        Asked(prompt(33), options(40, temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=5)),
        Asked(prompt(9), options(40, repetition_penalty=1.3)),
        Asked(prompt(70), options(5, logprobs=3)),
    ]


async def soak(fleet: Fleet, duration_s: float, streams: int, every_s: float, seed: int) -> Figures:
    """Traffic and kills for so many seconds; then what still runs is waited for."""
    rng, figures = random.Random(seed), Figures()
    addresses = fleet.made_whole(spares=range(SECTIONS))
    async with await Pipeline.open(
        addresses, max_sequences=streams + 2, max_tokens_hint=1000, recovery=PATIENCE
    ) as pipeline:
        requests = pool()
        expected = await ask_all(pipeline, requests)
        end_s = time.monotonic() + duration_s
        lanes = [
            lane(pipeline, random.Random(rng.random()), requests, expected, end_s, figures)
            for _ in range(streams)
        ]
        watching = asyncio.ensure_future(watch(fleet["0"].pid, figures))
        killing = asyncio.ensure_future(strike(fleet, rng, every_s, end_s, figures))
        try:
            await asyncio.gather(*lanes)
            await killing
        finally:
            for task in (watching, killing):
                task.cancel()
            await asyncio.gather(watching, killing, return_exceptions=True)
    return figures


async def lane(
    pipeline: Pipeline,
    rng: random.Random,
    requests: Sequence[Asked],
    expected: Sequence[Heard],
    end_s: float,
    figures: Figures,
) -> None:
    """One request after the other."""
    while time.monotonic() < end_s:
        number = rng.randrange(len(requests))
        if rng.random() < 0.1:
            await leave_early(pipeline, requests[number], figures)
            continue
        heard = (await ask_all(pipeline, [requests[number]]))[0]
        heard.check_pieces()
        figures.requests += 1
        figures.tokens += heard.completion.completion_tokens
        if heard.story != expected[number].story:
            figures.failed += 1
            if len(figures.errors) < 5:
                figures.errors.append(heard.completion.error or f"request {number} says otherwise")


async def leave_early(pipeline: Pipeline, asked: Asked, figures: Figures) -> None:
    """Read a piece, and go away."""
    figures.cancelled += 1
    async for _ in pipeline.stream(asked.prompt, asked.options):
        return


async def strike(
    fleet: Fleet, rng: random.Random, every_s: float, end_s: float, figures: Figures
) -> None:
    """Kill or freeze somebody, but not the first section's worker, until the time is over."""
    names = [*(str(index) for index in range(1, SECTIONS)), *(f"{it}s" for it in range(SECTIONS))]
    while (pause_s := rng.uniform(0.5, 1.5) * every_s) and time.monotonic() + pause_s < end_s:
        await asyncio.sleep(pause_s)
        name = rng.choice(names)
        if rng.random() < 0.2:
            figures.freezes += 1
            fleet[name].signal(signal.SIGSTOP)
            await asyncio.sleep(FREEZE_S)
            fleet[name].signal(signal.SIGCONT)
        else:
            figures.kills += 1
            fleet.kill(name)
            fleet.revive(name)


async def watch(worker: int, figures: Figures) -> None:
    """Memory of this process and of one worker."""
    began_s = time.monotonic()
    while True:
        minutes = (time.monotonic() - began_s) / 60
        for pid, samples in ((os.getpid(), figures.manager_mb), (worker, figures.worker_mb)):
            samples.append((minutes, psutil.Process(pid).memory_info().rss / MB))
        await asyncio.sleep(SAMPLE_EVERY_S)


if __name__ == "__main__":
    main()
