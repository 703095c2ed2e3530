"""transformers as a contestant, in a process of its own that is fed lines of JSON.

This file is both ends: `TransformersContestant` is the one that measures, `main` the process, which
loads the whole model. Every question is {"prompts": [[...]], "new_tokens": N}, every answer
{"times_s": [[...]]}: when each token of each stream came, since the prompts were handed over.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from manager.bench_streams import Prompts, Run
from manager.worker_process import launch, with_this_installation
from proto.errors import Error

MAX_LINE_BYTES: Final = 2**24
GENERATE, CONTINUOUS = "generate", "continuous"


class TransformersContestant:
    """A process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process, name: str = "transformers") -> None:
        self._process, self._name = process, name

    @property
    def name(self) -> str:
        """For tables."""
        return self._name

    async def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """As `manager.bench_streams.Contestant`."""
        question = json.dumps({"prompts": [list(it) for it in prompts], "new_tokens": new_tokens})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question.encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            pass  # its last words say why
        answer = await read_answer(self._process)
        return Run(len(prompts[0]), tuple(map(tuple, answer["times_s"])))


@asynccontextmanager
async def transformers_process(
    model: str,
    *,
    threads: int,
    dtype: str = "auto",
    device: str = "cpu",
    way: str = GENERATE,
    name: str = "transformers",
) -> AsyncIterator[TransformersContestant]:
    """The model whole, in a process that ends with the block.

    Args:
        model: a folder or a hub id.
        dtype: "bfloat16"; "auto" is the checkpoint's own.
        way: GENERATE, one batch at a time; or CONTINUOUS, its continuous batching.
    Raises:
        Error: it cannot be loaded, in one sentence.
    """
    words = [sys.executable, "-m", "manager.bench_transformers"]
    words += [model, dtype, device, str(threads), way]
    process = await asyncio.create_subprocess_exec(
        *launch(words),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=MAX_LINE_BYTES,
        env={**with_this_installation(os.environ), "OMP_NUM_THREADS": str(threads)},
        start_new_session=True,
    )
    try:
        await read_answer(process)
        yield TransformersContestant(process, name)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def read_answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """The next line that it says.

    Raises:
        Error: it says that it failed, or ended.
    """
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        code = await process.wait()
        raise Error(f"the process of transformers ended with exit code {code}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise Error(f"transformers cannot run it: {answer['error']}")
    return answer


# --- the process ------------------------------------------------------------------------------


def main(model: str, dtype: str, device: str, threads: str, way: str) -> None:
    """Answer until stdin ends."""
    import torch
    import transformers

    logs: Any = transformers.logging
    logs.set_verbosity_error()
    torch.set_num_threads(int(threads))
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded.to(device).eval()
        loaded.generation_config.eos_token_id = None
        loaded.generation_config.pad_token_id = 0
        _answer(ready=True)
        for line in sys.stdin:
            question = json.loads(line)
            run = _generate if way == GENERATE else _continuous
            _answer(times_s=run(loaded, question["prompts"], question["new_tokens"]))
    except Exception as exc:  # whatever foreign code raises: it becomes a sentence over there
        _answer(error=f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}")


def _generate(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
    """All streams in one batch, a step at a time."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    ids = torch.tensor(prompts, device=model.device)
    times_s: list[float] = []

    class Clock(StoppingCriteria):
        """Notes when a step is done, and stops nothing."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            input_ids[0, -1].item()  # on a GPU: it is there only now
            times_s.append(time.perf_counter() - begun_s)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    begun_s = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        stopping_criteria=StoppingCriteriaList([Clock()]),
    )
    return [times_s] * len(prompts)


def _continuous(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
    """As transformers serves: its manager stays from one question to the next."""
    import transformers

    library: Any = transformers
    config = library.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    begun_s = time.perf_counter()
    done = model.generate_batch(
        inputs=prompts,
        generation_config=config,
        record_timestamps=True,
        persistent_manager=True,
    )
    failed = next((it.error for it in done.values() if it.error), None)
    if failed:
        raise RuntimeError(failed)
    return [[at_s - begun_s for at_s in it.timestamps] for it in done.values()]


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
