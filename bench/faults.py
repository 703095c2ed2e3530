"""How long do streams pause when a worker is killed, and does a request fail?

    python bench/faults.py [--kills 51] [--streams 8] [--model DIR] [--json]

Three sections of a model on this machine, every worker a process of its own. While `--streams`
greedy streams run, a random worker gets SIGKILL, again and again, a third of the times with a spare
waiting, a third with a supervisor that starts it again at once, a third with nobody, so that the
others take its layers over. Two times are taken for each kill, both by the manager's clock:

    noticed    from the kill to the manager knowing it
    recovered  from the kill to the first token of any stream that came after it

and every stream must end with the tokens that it has when nobody is killed; one that does not, or
that ends with an error, counts as failed. With failed requests the exit code is 1.

Without --model a random float32 Llama of 100 MB is made in a temporary folder. Workers are forked
from a process that has imported torch, so a restart does not include that import; where `worker` is
started afresh it adds what `python -c "import torch, transformers"` takes there.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from manager.generation import GenerationOptions  # noqa: E402 - works from any folder
from manager.metrics import quantile  # noqa: E402
from manager.pipeline import Pipeline  # noqa: E402
from manager.recovery import RecoverySettings  # noqa: E402
from tests.support.fleet import SECTIONS, Asked, Fleet, Heard, ask_all  # noqa: E402
from tests.support.forked_workers import Nursery  # noqa: E402
from tests.support.sibling import save_sibling  # noqa: E402

WAYS = ("spare", "restart", "takeover")
PATIENCE_S = 120.0
SMALLER = {"hidden_size": 512, "intermediate_size": 1536}


@dataclass
class Figures:
    """Of one way to go on."""

    noticed_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    requests: int = 0
    failed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Counts, medians and extremes."""
        return {
            "kills": len(self.recovered_s),
            "requests": self.requests,
            "failed": self.failed,
            "noticed_s": {"p50": quantile(self.noticed_s, 0.5), "max": max(self.noticed_s)},
            "recovered_s": {"p50": quantile(self.recovered_s, 0.5), "max": max(self.recovered_s)},
        }


class Strike:
    """One kill, and what was seen of it."""

    def __init__(self, fleet: Fleet, victim: str, at_token: int, *, revive: bool) -> None:
        self._fleet, self._victim, self._at_token = fleet, victim, at_token
        self._revive = revive
        self.killed_s = self.noticed_s = self.recovered_s = 0.0

    def token(self, _of_request: int, of_all: int) -> None:
        """A token of any stream came."""
        if not self.killed_s and of_all >= self._at_token:
            self.killed_s = time.monotonic()
            self._fleet.kill(self._victim)
            if self._revive:
                self._fleet.revive(self._victim)
        elif self.noticed_s and not self.recovered_s:
            self.recovered_s = time.monotonic()

    def notice(self, text: str) -> None:
        """The manager says something."""
        if self.killed_s and not self.noticed_s and "was lost" in text:
            self.noticed_s = time.monotonic()


@click.command()
@click.option("--kills", default=51, show_default=True)
@click.option("--streams", default=8, show_default=True)
@click.option("--new-tokens", default=24, show_default=True)
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="A checkpoint folder.")
@click.option("--seed", default=0, show_default=True, help="Of who is killed when.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    kills: int, streams: int, new_tokens: int, model: str | None, seed: int, as_json: bool
) -> None:
    """Kill, measure, and print medians and maxima."""
    with tempfile.TemporaryDirectory() as folder:
        path = (
            Path(model)
            if model
            else save_sibling(Path(folder), hidden_size=512, intermediate_size=1536)
        )
        with Nursery() as nursery:
            requests = [
                Asked(
                    prompt(stream, 32),
                    GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True),
                )
                for stream in range(streams)
            ]
            figures = asyncio.run(measure(Fleet(nursery, path, "256MB"), requests, kills, seed))
    failed = sum(it.failed for it in figures.values())
    found = {way: it.as_json() for way, it in figures.items() if it.recovered_s}
    if as_json:
        click.echo(json.dumps({"ways": found, "failed": failed, "load": os.getloadavg()[0]}))
    else:
        show(found)
    sys.exit(1 if failed else 0)


def prompt(stream: int, length: int) -> list[int]:
    """Some token ids."""
    return [1 + (7 * stream + 13 * at) % 250 for at in range(length)]


async def measure(
    fleet: Fleet, requests: Sequence[Asked], kills: int, seed: int
) -> dict[str, Figures]:
    """So many kills, the ways taking turns."""
    rng = random.Random(seed)
    expected: list[Heard] | None = None
    figures = {way: Figures() for way in WAYS}
    for number in range(kills + 1):
        way = WAYS[number % len(WAYS)]
        victim = rng.randrange(SECTIONS)
        at_token = rng.randint(1, sum(it.options.max_new_tokens for it in requests) * 3 // 4)
        addresses = fleet.made_whole(spares=[victim] if way == "spare" else [])
        strike = Strike(fleet, str(victim), at_token, revive=way == "restart")
        settings = RecoverySettings(
            timeout_s=PATIENCE_S, resplit_after_s=0 if way == "takeover" else None
        )
        async with await Pipeline.open(
            addresses,
            max_sequences=len(requests),
            max_tokens_hint=64 + max(it.options.max_new_tokens for it in requests),
            recovery=settings,
            on_notice=strike.notice,
        ) as pipeline:
            if expected is None:  # the first time nobody is killed
                expected = await ask_all(pipeline, requests)
                continue
            heard = await ask_all(pipeline, requests, on_token=strike.token)
        count(figures[way], strike, heard, expected)
        if way == "takeover":  # they hold other layers than they were started with
            for name in map(str, range(SECTIONS)):
                fleet.kill(name)
    return figures


def count(
    figures: Figures, strike: Strike, heard: Sequence[Heard], expected: Sequence[Heard]
) -> None:
    """Add what came of one kill."""
    figures.noticed_s.append(strike.noticed_s - strike.killed_s)
    figures.recovered_s.append(strike.recovered_s - strike.killed_s)
    figures.requests += len(heard)
    for one, other in zip(heard, expected, strict=True):
        one.check_pieces()
        figures.failed += one.completion.error is not None or one.story != other.story


def show(found: dict[str, dict[str, Any]]) -> None:
    """A table for people; milliseconds."""
    table = Table("way", "kills", "requests", "failed", "noticed", "recovered p50", "max")
    for way, it in found.items():
        noticed = f"{1e3 * it['noticed_s']['p50']:.0f} ms (max {1e3 * it['noticed_s']['max']:.0f})"
        times = [f"{1e3 * it['recovered_s'][name]:.0f} ms" for name in ("p50", "max")]
        counts = [str(it[name]) for name in ("kills", "requests", "failed")]
        table.add_row(way, *counts, noticed, *times)
    Console().print(table)
    Console().print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
