"""Mixed requests for some minutes while workers are killed: does one fail, does memory grow?

    python bench/soak.py [--minutes 10] [--streams 6] [--every 3] [--max-slope 60] [--json]

Three sections of a tiny random model on this machine and a spare of each, every worker a process of
its own. `--streams` lanes take requests of many kinds, one after the other: greedy and sampled,
short and long prompts, penalties, readers that go away in the middle. About every `--every` seconds
a worker of the last two sections gets SIGKILL and is started again at once, or now and then one of
the first section SIGSTOP for a moment: its two workers live as long as the manager, so that the
memory of these three is seen over the whole time.

Every text is compared with what it was before the first kill; one that differs, or ends with an
error, counts as failed. Memory is RSS, sampled twice a second. Its slope is that of the line of
least squares through the second half of the run, in MB an hour, with the half width of its 95 %
confidence interval; neighbours in time are put together into 20 means first, as samples that follow
each other say nearly the same.

The exit code is 1 when a request failed, or when some slope is above `--max-slope` by more than
chance explains (its interval's lower end is). Runs of less than four minutes are too short to judge
memory by: caches still fill.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Final

import click
import psutil
from rich.console import Console
from rich.table import Table

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
JUDGED_MINUTES: Final = 4.0
MEANS: Final = 20
TWO_SIDED_95: Final = 2.1  # of Student's t with 18 degrees of freedom
LONG_LIVED: Final = ("0", "0s")  # the first section's workers: never killed


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
    minutes: float = 0.0
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # (hours, RSS in MB)

    def as_json(self, max_slope: float) -> dict[str, Any]:
        """Counts, slopes, and what is wrong with them."""
        counts = ("minutes", "requests", "tokens", "cancelled", "failed", "kills", "freezes")
        memory = {who: growth(samples) for who, samples in self.memory.items()}
        wrong = [f"{self.failed} requests failed: {'; '.join(self.errors)}"] if self.failed else []
        if self.minutes >= JUDGED_MINUTES:
            wrong += [
                f"the memory of {who} grows by {it['mb_per_hour']:.0f} +- {it['half_width']:.0f} "
                f"MB an hour, at most {max_slope:g} is allowed"
                for who, it in memory.items()
                if it["mb_per_hour"] - it["half_width"] > max_slope
            ]
        return {name: getattr(self, name) for name in counts} | {"memory": memory, "wrong": wrong}


def growth(samples: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of one process over the second half of its samples."""
    half = samples[len(samples) // 2 :]
    size = max(1, len(half) // MEANS)
    groups = [half[at : at + size] for at in range(0, len(half) - size + 1, size)]
    points = [(mean([x for x, _ in it]), mean([y for _, y in it])) for it in groups]
    mb_per_hour, half_width = slope(points)
    return {
        "first_mb": half[0][1],
        "last_mb": half[-1][1],
        "mb_per_hour": mb_per_hour,
        "half_width": half_width,
    }


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the line of least squares, and half the width of its 95 % confidence interval."""
    if len(points) < 3:
        return 0.0, 0.0
    mean_x, mean_y = mean([x for x, _ in points]), mean([y for _, y in points])
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points)
    return found, TWO_SIDED_95 * math.sqrt(rest / (len(points) - 2) / spread)


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--streams", default=6, show_default=True)
@click.option("--every", default=3.0, show_default=True, help="Seconds between kills, on average.")
@click.option(
    "--max-slope", default=60.0, show_default=True, help="MB an hour that memory may grow."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def main(
    minutes: float, streams: int, every: float, max_slope: float, seed: int, as_json: bool
) -> None:
    """Run for so long, and say how it went."""
    with tempfile.TemporaryDirectory() as folder, Nursery() as nursery:
        tiny = save_tiny_with_tokenizer(Path(folder), max_position_embeddings=4096)
        fleet = Fleet(nursery, tiny.folder, "64MB")
        found = asyncio.run(soak(fleet, 60 * minutes, streams, every, seed)).as_json(max_slope)
    found["load"] = os.getloadavg()[0]
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(found)
    sys.exit(1 if found["wrong"] else 0)


def show(found: dict[str, Any]) -> None:
    """Lines and a table for people."""
    console = Console()
    console.print(
        f"{found['minutes']:.1f} minutes: {found['requests']} requests ({found['tokens']} tokens), "
        f"{found['failed']} failed, {found['cancelled']} left early; {found['kills']} kills, "
        f"{found['freezes']} freezes; load average {found['load']:.1f} on {os.cpu_count()} cores"
    )
    table = Table("memory of", "at half time", "at the end", "slope of the second half")
    for who, it in found["memory"].items():
        slope_text = f"{it['mb_per_hour']:+.1f} +- {it['half_width']:.1f} MB an hour"
        table.add_row(who, f"{it['first_mb']:.1f} MB", f"{it['last_mb']:.1f} MB", slope_text)
    console.print(table)
    if found["minutes"] < JUDGED_MINUTES:
        console.print(f"less than {JUDGED_MINUTES:g} minutes: the slopes say nothing yet")
    for sentence in found["wrong"]:
        console.print(f"wrong: {sentence}")


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
        pids = {"manager": os.getpid()} | {f"worker {it}": fleet[it].pid for it in LONG_LIVED}
        watching = asyncio.ensure_future(watch(pids, figures))
        killing = asyncio.ensure_future(strike(fleet, rng, every_s, end_s, figures))
        try:
            await asyncio.gather(*lanes)
            await killing
        finally:
            for task in (watching, killing):
                task.cancel()
            await asyncio.gather(watching, killing, return_exceptions=True)
    figures.minutes = duration_s / 60
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
    """Freeze a worker of the first section, or kill one of the others, until the time is over."""
    killed = [f"{index}{kind}" for index in range(1, SECTIONS) for kind in ("", "s")]
    while (pause_s := rng.uniform(0.5, 1.5) * every_s) and time.monotonic() + pause_s < end_s:
        await asyncio.sleep(pause_s)
        if rng.random() < 0.2:
            name = rng.choice(LONG_LIVED)
            figures.freezes += 1
            fleet[name].signal(signal.SIGSTOP)
            await asyncio.sleep(FREEZE_S)
            fleet[name].signal(signal.SIGCONT)
        else:
            name = rng.choice(killed)
            figures.kills += 1
            fleet.kill(name)
            fleet.revive(name)


async def watch(pids: Mapping[str, int], figures: Figures) -> None:
    """Memory of this process and of the workers that live as long."""
    began_s = time.monotonic()
    while True:
        hours = (time.monotonic() - began_s) / 3600
        for who, pid in pids.items():
            rss_mb = psutil.Process(pid).memory_info().rss / MB
            figures.memory.setdefault(who, []).append((hours, rss_mb))
        await asyncio.sleep(SAMPLE_EVERY_S)


if __name__ == "__main__":
    main()
