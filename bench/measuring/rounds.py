"""`manager.bench_rounds`, told on stderr as it goes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence

from manager.bench_load import Load
from manager.bench_rounds import Case, Runs, take_turns, words
from manager.bench_streams import Contestant, Run


async def turns(
    contestants: Sequence[Contestant],
    cases: Sequence[Case],
    *,
    rounds: int,
    vocab_size: int,
    load: Load,
    plays: Mapping[str, Collection[str]] | None = None,
) -> Runs:
    """As `take_turns`; what else the machine did goes into `load`."""
    return await take_turns(
        contestants,
        cases,
        rounds=rounds,
        vocab_size=vocab_size,
        plays=plays,
        around=load.noted,
        on_run=_on_run,
        on_failure=lambda name, why: say(f"  {name} gave up: {why}"),
    )


def say(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def _on_run(number: int, name: str, case: str, run: Run | None) -> None:
    if run is not None:
        say(f"  round {number}: {name}, {case}: {words(run)}")
    elif not number:
        say(f"  warm-up: {name}, {case}")
