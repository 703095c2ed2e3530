"""Use Comboio from a Python program: stream one text, generate several at once, load one stage.

    python examples/pipeline_api.py

Starts two workers on this machine for as long as it runs. With workers of your own, leave
`SpawnedWorkers` out and give their addresses to `Pipeline.open`.
"""

from __future__ import annotations

import asyncio

from engine.stage_loading import load_stage
from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from manager.spawn import SpawnConfig, SpawnedWorkers

PROMPTS = ("Return a list of", "Raise an error if", "The default value is")


async def main() -> None:
    async with SpawnedWorkers(SpawnConfig(count=2)) as workers:
        addresses = [str(address) for address in workers.addresses]
        async with await Pipeline.open(addresses, max_sequences=len(PROMPTS)) as pipeline:
            for facts in pipeline.workers:
                print(f"{facts.listen} holds layers {facts.start_layer}:{facts.end_layer}")
            await stream_one(pipeline)
            await generate_several(pipeline)
            for facts, status, rtt_s in await pipeline.status():
                print(f"{facts.listen}: {status.steps} steps, {(rtt_s or 0) * 1000:.2f} ms away")


async def stream_one(pipeline: Pipeline) -> None:
    """Show a text as it comes."""
    options = GenerationOptions(max_new_tokens=40, temperature=0.8, top_p=0.9, seed=7)
    print(f"\n{PROMPTS[0]}", end="")
    async for piece in pipeline.stream(PROMPTS[0], options):
        print(piece.text, end="", flush=True)
    print(f"\n[{piece.finish_reason}]\n")


async def generate_several(pipeline: Pipeline) -> None:
    """Many requests at once share the workers' steps."""
    options = GenerationOptions(max_new_tokens=24)
    completions = await asyncio.gather(*(pipeline.generate(it, options) for it in PROMPTS))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        rate = completion.decode_tokens_per_s or 0
        print(f"{prompt!r} + {completion.text!r} ({rate:.0f} tokens/s)")


def load_one_stage() -> None:
    """What a worker does at its start: read one section of a model, nothing else."""
    stage = load_stage(None, sections=2, index=1)
    print(
        f"\nsection 1 of 2 of {stage.model_name}: layers {stage.start_layer}:{stage.end_layer}, "
        f"{stage.stage_bytes} bytes held, {stage.read_bytes} bytes read"
    )


if __name__ == "__main__":
    asyncio.run(main())
    load_one_stage()
