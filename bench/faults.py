"""How long do streams pause when a worker is killed, and does a request fail?

    python bench/faults.py [--kills 51] [--freezes 17] [--streams 8] [--model DIR] [--json]

Three sections of a model on this machine, every worker a process of its own. While `--streams`
greedy streams run, a random worker gets SIGKILL, again and again, a third of the times with a spare
waiting, a third with a supervisor that starts it again at once, a third with nobody, so that the
others take its layers over at once. `--freezes` times it gets SIGSTOP instead, with a spare
waiting: its socket stays open, as when a cable is pulled. Two times are taken, both by the
manager's clock:

    noticed    from the signal to the manager knowing of it
    recovered  from the signal to the first token of any stream that came after it was noticed

and every stream must end with the tokens that it has when nothing happens; one that does not, or
that ends with an error, counts as failed. The exit code is 1 when a request failed, or when it took
more than a second to notice a loss.

Without --model a random float32 Llama of 100 MB is made in a temporary folder. Workers are forked
from a process that has imported torch, so a restart does not include that import; where `worker` is
started afresh it adds what `python -c "import torch, transformers"` takes there.
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

KILLS = ("spare", "restart", "takeover")  # the ways to go on after a kill
FREEZE = "frozen"  # with a spare
PATIENCE_S = 120.0
NOTICE_LIMIT_S = 1.0


@dataclass
class Figures:
    """Of one kind of loss and one way to go on."""

    noticed_s: list[float] = field(default_factory=list)
    recovered_s: list[float] = field(default_factory=list)
    requests: int = 0
    failed: int = 0

    def as_json(self) -> dict[str, Any]:
        """Counts, medians and extremes."""
        return {
            "losses": len(self.recovered_s),
            "requests": self.requests,
            "failed": self.failed,
            "noticed_s": {"p50": quantile(self.noticed_s, 0.5), "max": max(self.noticed_s)},
            "recovered_s": {"p50": quantile(self.recovered_s, 0.5), "max": max(self.recovered_s)},
        }


class Strike:
    """One loss, and what was seen of it."""

    def __init__(self, fleet: Fleet, victim: str, at_token: int, way: str) -> None:
        self._fleet, self._victim, self._at_token, self._way = fleet, victim, at_token, way
        self.killed_s = self.noticed_s = self.recovered_s = 0.0

    def token(self, _of_request: int, of_all: int) -> None:
        """A token of any stream came."""
        if not self.killed_s and of_all >= self._at_token:
            self.killed_s = time.monotonic()
            if self._way == FREEZE:
                self._fleet[self._victim].signal(signal.SIGSTOP)
                return
            self._fleet.kill(self._victim)
            if self._way == "restart":
                self._fleet.revive(self._victim)
        elif self.noticed_s and not self.recovered_s:
            self.recovered_s = time.monotonic()

    def notice(self, text: str) -> None:
        """The manager says something."""
        if self.killed_s and not self.noticed_s and "was lost" in text:
            self.noticed_s = time.monotonic()


@click.command()
@click.option("--kills", default=51, show_default=True)
@click.option("--freezes", default=17, show_default=True)
@click.option("--streams", default=8, show_default=True)
@click.option("--new-tokens", default=24, show_default=True)
@click.option("--model", type=click.Path(exists=True, file_okay=False), help="A checkpoint folder.")
@click.option("--seed", default=0, show_default=True, help="Of who is killed when.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    kills: int,
    freezes: int,
    streams: int,
    new_tokens: int,
    model: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Kill, measure, and print medians and maxima."""
    ways = [KILLS[number % len(KILLS)] for number in range(kills)] + [FREEZE] * freezes
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
            figures = asyncio.run(measure(Fleet(nursery, path, "256MB"), requests, ways, seed))
    failed = sum(it.failed for it in figures.values())
    found = {way: it.as_json() for way, it in figures.items()}
    wrong = [f"{failed} requests failed"] if failed else []
    wrong += [
        f"{way}: it took {it['noticed_s']['max']:.2f} s to notice a loss, at most "
        f"{NOTICE_LIMIT_S:g} s are allowed"
        for way, it in found.items()
        if it["noticed_s"]["max"] > NOTICE_LIMIT_S
    ]
    if as_json:
        said = {"ways": found, "failed": failed, "wrong": wrong, "load": os.getloadavg()[0]}
        click.echo(json.dumps(said))
    else:
        show(found, wrong)
    sys.exit(1 if wrong else 0)


def prompt(stream: int, length: int) -> list[int]:
    """Some token ids."""
    return [1 + (7 * stream + 13 * at) % 250 for at in range(length)]


async def measure(
    fleet: Fleet, requests: Sequence[Asked], ways: Sequence[str], seed: int
) -> dict[str, Figures]:
    """A loss for each of the ways."""
    rng = random.Random(seed)
    expected: list[Heard] | None = None
    figures = {way: Figures() for way in dict.fromkeys(ways)}
    for way in ("", *ways):
        victim = rng.randrange(SECTIONS)
        at_token = rng.randint(1, sum(it.options.max_new_tokens for it in requests) * 3 // 4)
        addresses = fleet.made_whole(spares=[victim] if way in ("spare", FREEZE) else [])
        strike = Strike(fleet, str(victim), at_token, way)
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
            if expected is None:  # the first time nothing happens
                expected = await ask_all(pipeline, requests)
                continue
            heard = await ask_all(pipeline, requests, on_token=strike.token)
        count(figures[way], strike, heard, expected)
        if way == FREEZE:
            fleet.kill(str(victim))
        if way == "takeover":  # they hold other layers than they were started with
            for name in map(str, range(SECTIONS)):
                fleet.kill(name)
    return figures


def count(
    figures: Figures, strike: Strike, heard: Sequence[Heard], expected: Sequence[Heard]
) -> None:
    """Add what came of one loss."""
    figures.noticed_s.append(strike.noticed_s - strike.killed_s)
    figures.recovered_s.append(strike.recovered_s - strike.killed_s)
    figures.requests += len(heard)
    for one, other in zip(heard, expected, strict=True):
        one.check_pieces()
        figures.failed += one.completion.error is not None or one.story != other.story


def show(found: dict[str, dict[str, Any]], wrong: Sequence[str]) -> None:
    """A table for people; milliseconds."""
    console = Console()
    names = ("losses", "requests", "failed")
    table = Table("way", *names, "noticed", "max", "recovered", "max", caption="medians and maxima")
    for way, it in found.items():
        times = [
            f"{1e3 * it[what][which]:.0f} ms"
            for what in ("noticed_s", "recovered_s")
            for which in ("p50", "max")
        ]
        table.add_row(way, *(str(it[name]) for name in names), *times)
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for sentence in wrong:
        console.print(f"wrong: {sentence}")


if __name__ == "__main__":
    main()
