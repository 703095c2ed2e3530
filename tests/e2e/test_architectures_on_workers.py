"""Other architectures than the one that all other tests run, over real worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from tests.support.chains import Workers, save_tiny_with_tokenizer, sections_of

# Positions of its own (learnt), windows with two rotary tables, stacked experts, and tables that
# change with the length: the LongRoPE one switches at 64 tokens, here while it generates.
KINDS = [("gpt2", 2), ("gemma3", 3), ("mixtral", 4), ("phi35_longrope", 2)]
LENGTHS = (1, 50, 63, 64, 150, 200)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "sections"), KINDS, ids=lambda it: str(it))
async def test_many_prompts_at_once_give_the_tokens_of_transformers(
    kind: str, sections: int, tmp_path: Path, start: Callable[..., Workers]
) -> None:
    model = save_tiny_with_tokenizer(tmp_path, kind)
    workers = start(*sections_of(tmp_path, sections, "--kv-memory", "16MB"))
    prompts = {
        length: [10 + (7 * at * at + length) % 250 for at in range(length)] for length in LENGTHS
    }
    options = GenerationOptions(max_new_tokens=24, ignore_eos=True)
    async with await Pipeline.open(workers.addresses, max_tokens_hint=256) as pipeline:
        completions = await asyncio.gather(
            *(pipeline.generate(prompt, options) for prompt in prompts.values())
        )
    for (length, prompt), completion in zip(prompts.items(), completions, strict=True):
        assert list(completion.token_ids) == model.greedy(prompt, 24), (kind, length)
