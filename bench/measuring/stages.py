"""What one decode step costs each stage, by the workers' own counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manager.bench_streams import PipelineContestant, random_prompts
from proto.messages import WorkerFacts


@dataclass(frozen=True)
class StageStep:
    """One worker, in one decode step of one stream."""

    facts: WorkerFacts
    compute_s: float  # of torch's thread

    @property
    def bytes_per_s(self) -> float:
        """Weights read, where a step reads all of them once."""
        return self.facts.stage_bytes / self.compute_s


async def decode_step(
    contestant: PipelineContestant, *, prompt_tokens: int, steps: int, vocab_size: int, seed: int
) -> Sequence[StageStep]:
    """Mean compute of a decode step, the prompt's own steps left out.

    A run of one token is the prompt alone; a run of `steps` more, without it, is the decode steps.
    """
    prompts = [
        random_prompts(1, prompt_tokens, vocab_size, seed=2 * seed + more) for more in (0, 1)
    ]
    alone = await _compute_s(contestant, prompts[0], 1)
    whole = await _compute_s(contestant, prompts[1], 1 + steps)
    return [
        StageStep(facts, (with_decode - without) / steps)
        for facts, with_decode, without in zip(
            contestant.pipeline.workers, whole, alone, strict=True
        )
    ]


async def _compute_s(
    contestant: PipelineContestant, prompts: list[list[int]], new_tokens: int
) -> list[float]:
    before = await contestant.pipeline.status()
    await contestant.generate(prompts, new_tokens)
    after = await contestant.pipeline.status()
    return [
        late.compute_s - early.compute_s
        for (_, early, _), (_, late, _) in zip(before, after, strict=True)
    ]
