"""Contestants take turns, round after round, so that a machine that slows down slows all of them.

The first round warms up and does not count; figures are medians over the others. A contestant that
fails takes no part any more, and its sentence is kept. Knows contestants and cases, no terminal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from manager.bench_streams import Contestant, Run, random_prompts
from manager.metrics import quantiles
from proto.errors import Error

WARM_UP_TOKENS: Final = 4
FIGURES: Final = ("wall_s", "tokens_per_s", "decode_tokens_per_s", "prompt_tokens_per_s")


@dataclass(frozen=True, slots=True)
class Case:
    """What a contestant is asked to do in one run."""

    name: str
    streams: int
    prompt_tokens: int
    new_tokens: int
    rounds: int | None = None  # of all rounds only the first ones; None: all


@dataclass
class Runs:
    """All runs that count, by case and contestant."""

    found: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # contestant -> why it gave up

    def values(self, case: str, contestant: str, figure: str) -> list[float]:
        """A figure of `Run`, a value a round."""
        runs = self.found.get((case, contestant), ())
        return [value for run in runs if (value := getattr(run, figure)) is not None]

    def median(self, case: str, contestant: str, figure: str) -> float | None:
        """Of its values; None without any."""
        values = self.values(case, contestant, figure)
        return statistics.median(values) if values else None

    def busy(self, case: str, contestant: str) -> list[float]:
        """The median share of each worker."""
        runs = self.found.get((case, contestant), ())
        return [statistics.median(shares) for shares in zip(*(it.busy for it in runs), strict=True)]

    def as_json(self) -> list[dict[str, Any]]:
        """Medians, quantiles and single values of everything that ran."""
        return [
            {
                "case": case,
                "contestant": name,
                "streams": len(runs[0].times_s),
                "prompt_tokens": runs[0].prompt_tokens,
                "new_tokens": len(runs[0].times_s[0]),
                **{it: self.median(case, name, it) for it in FIGURES},
                "first_token_s": quantiles([at_s for run in runs for at_s in run.first_s]),
                "between_tokens_s": quantiles([gap for run in runs for gap in run.gaps_s]),
                "busy": self.busy(case, name),
                "rounds": [{it: getattr(run, it) for it in FIGURES} for run in runs],
            }
            for (case, name), runs in self.found.items()
        ]


async def take_turns(
    contestants: Sequence[Contestant],
    cases: Sequence[Case],
    *,
    rounds: int,
    vocab_size: int,
    plays: Mapping[str, Collection[str]] | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    on_run: Callable[[int, str, str, Run | None], None] = lambda *_: None,
    on_failure: Callable[[str, str], None] = lambda *_: None,
) -> Runs:
    """Every contestant in every case, `rounds` times and once to warm up.

    Args:
        plays: contestant -> names of the cases that it takes part in; None: all in all.
        around: entered around every run that counts.
        on_run: told round, contestant and case before each run, and again with what came of it.
    """
    runs, seed = Runs(), 0
    for number in range(rounds + 1):
        for case in cases:
            if case.rounds is not None and number > case.rounds:
                continue
            for contestant in contestants:
                name = contestant.name
                if name in runs.failures or (plays is not None and case.name not in plays[name]):
                    continue
                seed += 1  # no prompt twice: what is kept of an earlier one helps nobody
                prompts = random_prompts(case.streams, case.prompt_tokens, vocab_size, seed=seed)
                new_tokens = case.new_tokens if number else min(WARM_UP_TOKENS, case.new_tokens)
                on_run(number, name, case.name, None)
                try:
                    with around() if number else nullcontext():
                        run = await contestant.generate(prompts, new_tokens)
                except Error as exc:
                    runs.failures[name] = str(exc)
                    on_failure(name, str(exc))
                    continue
                if number:
                    runs.found.setdefault((case.name, name), []).append(run)
                    on_run(number, name, case.name, run)
    return runs


def words(run: Run) -> str:
    """One run in a line."""
    parts = [f"{run.tokens_per_s:.1f} tokens/s"]
    if run.decode_tokens_per_s is not None:
        parts.append(f"{run.decode_tokens_per_s:.1f} decoding")
    parts.append(f"prompts at {run.prompt_tokens_per_s:.0f}")
    return ", ".join(parts)
