"""KV blocks over real workers: too few of them, long prompts, and prompts that begin alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from tests.support.chains import TinyModel, Workers, sections_of


def prompt_of(length: int, salt: int = 0) -> list[int]:
    """Some token ids that are no special tokens."""
    return [10 + (7 * at * at + salt) % 250 for at in range(length)]


def greedy(num_tokens: int) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=num_tokens, ignore_eos=True)


async def test_sequences_that_were_put_off_for_want_of_kv_give_the_same_tokens(
    tiny: TinyModel, start: Callable[..., Workers]
) -> None:
    workers = start(*sections_of(tiny.folder, 2, "--kv-memory", "252000"))
    prompts = [prompt_of(60 + 20 * number, number) for number in range(8)]
    async with await Pipeline.open(workers.addresses, max_sequences=8) as pipeline:
        completions = await asyncio.gather(
            *(pipeline.generate(prompt, greedy(60)) for prompt in prompts)
        )
        stats = pipeline.stats()
    assert stats.preemptions > 0, "the KV held them all: this test shows nothing"
    assert stats.blocks_free == stats.blocks_total
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt, 60), len(prompt)


async def test_long_prompts_in_many_chunks_give_the_same_tokens(
    workers: Workers, tiny: TinyModel
) -> None:
    prompts = [prompt_of(length, length) for length in (3500, 1800, 900, 5)]
    async with await Pipeline.open(workers.addresses, max_sequences=4) as pipeline:
        completions = await asyncio.gather(
            *(pipeline.generate(prompt, greedy(20)) for prompt in prompts)
        )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt, 20), len(prompt)


async def test_prompts_that_begin_alike_share_blocks_and_end_differently(
    workers: Workers, tiny: TinyModel
) -> None:
    prompts = [[*prompt_of(700), 50 + number] for number in range(4)]
    async with await Pipeline.open(workers.addresses, max_sequences=4) as pipeline:
        completions = await asyncio.gather(
            *(pipeline.generate(prompt, greedy(10)) for prompt in prompts)
        )
        assert pipeline.stats().shared_tokens >= 3 * 512
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt, 10), prompt[-1]
