"""Some streams at once over whatever runs the model, and what the times of their tokens say.

A contestant takes prompts of so many tokens each and generates exactly as many new ones for each;
all prompts are handed over at once. Definitions, the same for every contestant:

- wall: all new tokens / the time from handing the prompts over to the last token of all;
- decode: the tokens that came while every stream was decoding (after the last stream's first token,
  until the first stream's last one) / that time. None where the streams never all decoded;
- first token: of one stream, since the prompts were handed over; prompt tokens a second are those
  of all streams / the time to the last stream's first token;
- between tokens: of one stream, all streams together.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from manager.generation import GenerationOptions
from proto.errors import Error
from proto.tls import TlsFiles

if TYPE_CHECKING:
    from manager.bench_rounds import Case
    from manager.pipeline import Pipeline

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one contestant did with some prompts."""

    prompt_tokens: int  # of each stream
    times_s: tuple[tuple[float, ...], ...]  # of each stream's tokens, since the prompts were handed
    busy: tuple[float, ...] = ()  # of each worker: its torch thread's share of the time

    @property
    def wall_s(self) -> float:
        """Until the last token of all."""
        return max(times[-1] for times in self.times_s)

    @property
    def num_tokens(self) -> int:
        """Generated, of all streams."""
        return sum(map(len, self.times_s))

    @property
    def tokens_per_s(self) -> float:
        """All new tokens, prompts' time included."""
        return self.num_tokens / self.wall_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """While every stream decodes."""
        begin_s = max(times[0] for times in self.times_s)
        end_s = min(times[-1] for times in self.times_s)
        if end_s <= begin_s:
            return None
        within = sum(begin_s < at_s <= end_s for times in self.times_s for at_s in times)
        return within / (end_s - begin_s)

    @property
    def prompt_tokens_per_s(self) -> float:
        """Until every stream had its first token."""
        return self.prompt_tokens * len(self.times_s) / max(times[0] for times in self.times_s)

    @property
    def first_s(self) -> tuple[float, ...]:
        """Each stream's time to its first token."""
        return tuple(times[0] for times in self.times_s)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Times between two tokens of one stream."""
        return tuple(b - a for times in self.times_s for a, b in pairwise(times))


class Contestant(Protocol):
    """Something that runs the model."""

    @property
    def name(self) -> str:
        """For tables."""

    async def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """Generate `new_tokens` for each of the prompts, all at once, greedily, past any end token.

        Raises:
            Error: it could not, in one sentence.
        """


class PipelineContestant:
    """Our own workers, called in this process: the manager's work is in the figures."""

    def __init__(self, pipeline: Pipeline, name: str = "comboio") -> None:
        self.pipeline, self._name = pipeline, name

    @property
    def name(self) -> str:
        """For tables."""
        return self._name

    async def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """As `Contestant`."""
        options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
        before = await self.pipeline.status()
        begun_s = time.monotonic()
        done = await asyncio.gather(*(self.pipeline.generate(it, options) for it in prompts))
        wall_s = time.monotonic() - begun_s
        after = await self.pipeline.status()
        for completion in done:
            if completion.error is not None:
                raise Error(completion.error)
            if completion.completion_tokens != new_tokens:
                raise Error(
                    f"a stream ended after {completion.completion_tokens} of {new_tokens} tokens"
                    f"{f': {completion.detail}' if completion.detail else ''}; shorter prompts, "
                    "fewer streams or more --kv-memory on the workers leave room"
                )
        return Run(
            len(prompts[0]),
            tuple(completion.token_times_s for completion in done),
            tuple(
                (late.compute_s - early.compute_s) / wall_s
                for (_, early, _), (_, late, _) in zip(before, after, strict=True)
            ),
        )


async def record_trace(
    pipeline: Pipeline,
    path: Path,
    case: Case,
    *,
    model: str | None,
    secret_file: Path | None = None,
    tls: TlsFiles | None = None,
) -> None:
    """Run a case once more over the same workers, with a trace of every step at `path`."""
    from manager.pipeline import Pipeline
    from manager.trace import open_trace

    prompts = random_prompts(
        case.streams, case.prompt_tokens, pipeline.workers[0].vocab_size, seed=-1
    )
    traced = await Pipeline.open(
        pipeline.addresses,
        model=model,
        secret_file=secret_file,
        tls=tls,
        max_sequences=case.streams,
        max_tokens_hint=case.prompt_tokens + case.new_tokens + 1,
        trace=open_trace(path),
    )
    async with traced:
        await PipelineContestant(traced).generate(prompts, case.new_tokens)


def random_prompts(
    streams: int, prompt_tokens: int, vocab_size: int, *, seed: int
) -> list[list[int]]:
    """Prompts of exactly so many tokens, another text for every seed and stream.

    No prompt begins like another one: a prefix that is kept from an earlier one helps nobody.
    """
    draw = random.Random(seed)
    low = min(vocab_size - 1, vocab_size // 8)  # what is special mostly stands first
    return [[draw.randrange(low, vocab_size) for _ in range(prompt_tokens)] for _ in range(streams)]
