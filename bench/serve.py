"""What HTTP costs: tokens a second and first tokens by `manager serve`, and by the engine alone.

    python bench/serve.py [--model DIR] [--streams 64] [--requests 4] [--rounds 15] [--json FILE]

The same two workers are used by both: by a pipeline in this process, and by a `manager serve` in
a process of its own, whose streams a third process reads over sockets (`http_streams.py`, whose
CPU time is in the notes). Both are driven alike: every stream sends its next request when its
answer is whole, with the same prompts and lengths. All begin at once, which makes the first tokens
"at once"; their lengths differ, so that later requests come one by one while the others stream:
first tokens "under load", which have a limit; those at once also wait for each other to be read.
In each round both take their turn; medians over the rounds are shown, of ratios and differences
within a round. Ends with code 1 where a limit is broken.

Without --model the demo model is used, whose steps are so short that what HTTP costs shows the
most. The workers take one thread each: server, client and workers share the cores.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.measuring import command
from bench.measuring.rounds import say
from bench.measuring.verdicts import Row, publish
from manager import event_loop
from manager.bench_load import Load
from manager.cli import Interrupted
from manager.generation import GenerationOptions, Piece
from manager.pipeline import Pipeline
from manager.spawn import SpawnConfig, SpawnedWorkers

ROOT: Final = Path(__file__).resolve().parents[1]
LEAST_SHARE: Final = 0.95  # of the engine's tokens a second
MOST_GROWTH_MS: Final = 10.0  # of the median time to the first token

PROMPT_TOKENS: Final = 32
VOCABULARY: Final = range(1, 256)  # that any model has
FEWEST_TOKENS, MOST_TOKENS = 32, 64


@dataclass(frozen=True)
class Wanted:
    """One request."""

    prompt: list[int]
    new_tokens: int


Plan = list[list[Wanted]]  # the requests of each stream


@dataclass(frozen=True)
class Taken:
    """One run of a plan."""

    tokens_per_s: float
    at_once_s: float  # median time to the first token of the streams' first requests
    under_load_s: float | None  # of the later ones
    manager_cpu_s: float  # of the process that owns the pipeline
    client_cpu_s: float = 0.0  # of the one that reads, where that is another


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--model", metavar="DIR", help="checkpoint; the demo model by default")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4, help="of each stream, one by one")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rounds, requests = (1, 2) if args.quick else (args.rounds, args.requests)
    load = Load()
    try:
        runs = event_loop.run(measure(args.model, args.streams, requests, rounds, load))
    except Interrupted as exc:
        sys.exit(exc.exit_code)
    rows = rows_of(runs, args.streams, judged=not args.quick)
    publish(
        rows,
        title=f"what HTTP costs, {args.streams} streams",
        load=load,
        json_file=args.json,
        notes=notes_of(runs),
        limits={"tokens_per_s_share": LEAST_SHARE, "first_token_growth_ms": MOST_GROWTH_MS},
        rounds={name: [asdict(it) for it in taken] for name, taken in runs.items()},
    )
    broken = [row.what for row in rows if row.share is not None and row.share < 1]
    if broken:
        sys.exit(f"over the limit: {', '.join(broken)}")


async def measure(
    model: str | None, streams: int, requests: int, rounds: int, load: Load
) -> dict[str, list[Taken]]:
    """Every round of both ways."""
    runs: dict[str, list[Taken]] = {"engine": [], "http": []}
    async with SpawnedWorkers(SpawnConfig(count=2, model=model, threads=1)) as workers:
        addresses = [str(address) for address in workers.addresses]
        # Its start is waited for before there is a link that wants to be answered.
        with serving(addresses, streams) as (port, server), reading(port) as ask:
            async with await Pipeline.open(addresses, max_sequences=streams) as pipeline:
                for number in range(rounds + 1):
                    plan = planned(streams, requests, number)
                    for name in sorted(runs, reverse=bool(number % 2)):
                        with load.noted():
                            if name == "engine":
                                taken = await directly(pipeline, plan)
                            else:
                                taken = await over_http(ask, server, plan)
                        say(f"  round {number}: {name}, {taken.tokens_per_s:.0f} tokens/s")
                        if number:  # the first round warms up
                            runs[name].append(taken)
    return runs


def planned(streams: int, requests: int, number: int) -> Plan:
    """The requests of a round: other prompts than in any other one, so that nothing is shared."""
    draws = random.Random(number)
    return [
        [
            Wanted(
                draws.choices(VOCABULARY, k=PROMPT_TOKENS),
                draws.randint(FEWEST_TOKENS, MOST_TOKENS),
            )
            for _ in range(requests)
        ]
        for _ in range(streams)
    ]


async def directly(pipeline: Pipeline, plan: Plan) -> Taken:
    """By the pipeline itself."""

    async def stream(wanted: Sequence[Wanted]) -> list[float]:
        return [await _first_token_s(pipeline, it) for it in wanted]

    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    firsts = await asyncio.gather(*map(stream, plan))
    seconds, cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    return _taken(plan, seconds, firsts, cpu_s)


async def _first_token_s(pipeline: Pipeline, wanted: Wanted) -> float:
    """From the request to its first token; returns when it is over."""
    first_s: list[float] = []

    def came(piece: Piece) -> None:
        if piece.token_ids and not first_s:
            first_s.append(time.monotonic())

    begun_s = time.monotonic()
    options = GenerationOptions(max_new_tokens=wanted.new_tokens, ignore_eos=True)
    await pipeline.generate(wanted.prompt, options, on_piece=came)
    return first_s[0] - begun_s


async def over_http(ask: Callable[[Any], Any], server: psutil.Process, plan: Plan) -> Taken:
    """The same through the server."""
    bodies = [
        [
            {
                "prompt": it.prompt,
                "max_tokens": it.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for it in wanted
        ]
        for wanted in plan
    ]
    begun_cpu_s = sum(server.cpu_times()[:2])
    got = await event_loop.in_background(ask, bodies)  # the pipeline's links want to be answered
    cpu_s = sum(server.cpu_times()[:2]) - begun_cpu_s
    for wanted, answers in zip(plan, got["streams"], strict=True):
        assert [it.new_tokens for it in wanted] == [tokens for _, _, tokens in answers]
    firsts = [[first_s - sent_s for sent_s, first_s, _ in it] for it in got["streams"]]
    return _taken(plan, got["seconds"], firsts, cpu_s, got["client_cpu_s"])


def _taken(plan: Plan, seconds: float, firsts: Sequence[Sequence[float]], *cpu_s: float) -> Taken:
    tokens = sum(it.new_tokens for wanted in plan for it in wanted)
    later = [taken_s for stream in firsts for taken_s in stream[1:]]
    return Taken(
        tokens / seconds,
        statistics.median(stream[0] for stream in firsts),
        statistics.median(later) if later else None,
        *cpu_s,
    )


def rows_of(runs: dict[str, list[Taken]], streams: int, *, judged: bool) -> list[Row]:
    """Both limits, and what was measured; `judged`: whether the rounds are enough to say so."""
    pairs = list(zip(runs["http"], runs["engine"], strict=True))
    ratios = [http.tokens_per_s / engine.tokens_per_s for http, engine in pairs]
    theirs = statistics.median(engine.tokens_per_s for _, engine in pairs)
    rows = [
        Row(
            "tokens over HTTP",
            f"{streams} streams",
            "tokens/s",
            theirs * statistics.median(ratios),
            "the engine alone",
            theirs,
            target=LEAST_SHARE if judged else None,
            spread=(min(ratios), max(ratios)),
        )
    ]
    for what, name in (("at once", "at_once_s"), ("under load", "under_load_s")):
        both = [(getattr(http, name), getattr(engine, name)) for http, engine in pairs]
        if any(None in pair for pair in both):
            continue
        growths = [1000 * (http_s - engine_s) for http_s, engine_s in both]
        http_ms, engine_ms = (1000 * statistics.median(it) for it in zip(*both, strict=True))
        rows.append(
            Row(
                f"first token later over HTTP, {what}",
                f"{streams} streams",
                "ms",
                statistics.median(growths),
                target=MOST_GROWTH_MS if judged and name == "under_load_s" else None,
                at_most=True,
                spread=(min(growths), max(growths)),
                note=f"median first token {what}: {engine_ms:.1f} ms by the engine alone, "
                f"{http_ms:.1f} ms over HTTP",
            )
        )
    return rows


def notes_of(runs: dict[str, list[Taken]]) -> list[str]:
    """Whose CPU it was."""
    engine, server, client = (
        1000 * statistics.median(times)
        for times in (
            [it.manager_cpu_s for it in runs["engine"]],
            [it.manager_cpu_s for it in runs["http"]],
            [it.client_cpu_s for it in runs["http"]],
        )
    )
    return [
        f"CPU a run: manager {engine:.0f} ms driven directly, {server:.0f} ms as a server; "
        f"who reads its streams {client:.0f} ms more"
    ]


@contextmanager
def serving(addresses: list[str], streams: int) -> Iterator[tuple[int, psutil.Process]]:
    """A server over these workers: its port, and its process."""
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
            yield int(found[1]), psutil.Process(server.pid)
        finally:
            server.terminate()
            server.wait(60)


@contextmanager
def reading(port: int) -> Iterator[Callable[[Any], Any]]:
    """Somebody who plays plans against that port."""
    words = [sys.executable, str(ROOT / "bench/measuring/http_streams.py"), str(port)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:

        def ask(plan: Any) -> Any:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(json.dumps(plan) + "\n")
            client.stdin.flush()
            line = client.stdout.readline()
            assert line, "who reads the streams gave up, see above"
            return json.loads(line)

        try:
            yield ask
        finally:
            client.terminate()


if __name__ == "__main__":
    command.run(main)
