"""The pipeline for programs, over real workers: what comes out, and what ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from proto.errors import ModelError, RequestRefused, SplitError, WorkerLost, WorkerUnreachable
from tests.support.chains import VOCAB, sections_of
from tests.support.models import save_tiny
from tests.support.processes import WorkerProcess

LENGTHS = (1, 2, 15, 16, 17, 40, 100, 200)


def prompt_of(length: int) -> list[int]:
    """Some token ids that are no special tokens."""
    return [10 + (7 * at * at + 13 * length) % 250 for at in range(length)]


def is_idle(pipeline: Pipeline) -> bool:
    stats = pipeline.stats()
    return stats.running + stats.waiting == 0


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until it is so; the test's own timeout bounds it."""
    loop = asyncio.get_running_loop()
    while not condition():
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


@pytest.fixture
async def pipeline(workers) -> AsyncIterator[Pipeline]:
    async with await Pipeline.open(workers.addresses, max_tokens_hint=400) as opened:
        yield opened


def greedy(num_tokens: int, **options) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=num_tokens, ignore_eos=True, **options)


async def test_greedy_tokens_are_those_of_transformers(pipeline, tiny):
    completion = await pipeline.generate(prompt_of(23), greedy(30))
    assert list(completion.token_ids) == tiny.greedy(prompt_of(23), 30)
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == 23
    assert completion.completion_tokens == 30


async def test_eight_prompts_at_once_give_what_each_gives_alone(pipeline, tiny):
    completions = await asyncio.gather(
        *(pipeline.generate(prompt_of(length), greedy(24)) for length in LENGTHS)
    )
    for length, completion in zip(LENGTHS, completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt_of(length), 24), length


async def test_a_seed_draws_the_same_text_alone_and_among_others(pipeline):
    drawn = greedy(24, temperature=1.5, top_p=0.95, seed=11)
    alone = await pipeline.generate(prompt_of(9), drawn)
    others = [pipeline.generate(prompt_of(n), greedy(24, temperature=2.0)) for n in (3, 40, 70)]
    among, *_ = await asyncio.gather(pipeline.generate(prompt_of(9), drawn), *others)
    another = await pipeline.generate(prompt_of(9), greedy(24, temperature=1.5, seed=12))
    assert among.token_ids == alone.token_ids
    assert another.token_ids != alone.token_ids


async def test_pieces_joined_are_the_completion(pipeline):
    pieces = [piece async for piece in pipeline.stream("the quick", greedy(40))]
    completion = await pipeline.generate("the quick", greedy(40))
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [i for piece in pieces for i in piece.token_ids] == list(completion.token_ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


async def test_a_stop_text_ends_the_text_before_it(pipeline):
    whole = await pipeline.generate("lazy dog", greedy(60))
    stop = whole.text[10:13]
    stopped = await pipeline.generate("lazy dog", greedy(60, stop=(stop,)))
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.completion_tokens < 60


async def test_the_token_that_ends_a_text_is_counted_and_not_shown(pipeline, tiny):
    whole = await pipeline.generate(prompt_of(5), greedy(60))
    # Let a token that the model really draws be the one that ends the text.
    end = whole.token_ids[12]
    before = whole.token_ids[: whole.token_ids.index(end)]
    ended = await pipeline.generate(prompt_of(5), greedy(60, stop_token_ids=(end,)))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == (*before, end)
    assert ended.text == tiny.tokenizer.decode(before, skip_special_tokens=True)


async def test_log_probabilities_come_with_every_token(pipeline):
    completion = await pipeline.generate(prompt_of(5), greedy(6, logprobs=3))
    assert [it.token_id for it in completion.logprobs] == list(completion.token_ids)
    for it in completion.logprobs:
        assert len(it.top) == 3
        assert it.top[0] == (it.token_id, it.logprob)


async def test_a_repetition_penalty_changes_what_repeats(pipeline):
    plain = await pipeline.generate(prompt_of(5), greedy(40))
    varied = await pipeline.generate(prompt_of(5), greedy(40, repetition_penalty=1.8))
    assert len(set(varied.token_ids)) > len(set(plain.token_ids))


async def test_leaving_a_stream_early_frees_its_blocks(pipeline):
    idle = pipeline.stats().blocks_free
    async for _piece in pipeline.stream(prompt_of(100), greedy(300)):
        assert pipeline.stats().blocks_free < idle
        break
    await until(lambda: is_idle(pipeline))
    assert pipeline.stats().blocks_free == idle
    assert (await pipeline.generate(prompt_of(3), greedy(4))).completion_tokens == 4


async def test_a_task_that_is_cancelled_ends_its_request(pipeline):
    task = asyncio.create_task(pipeline.generate(prompt_of(10), greedy(300)))
    await until(lambda: not is_idle(pipeline))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_idle(pipeline)


async def test_progress_is_told_while_a_prompt_is_read(pipeline):
    told: list[tuple[int, int]] = []
    prompt = prompt_of(1100)
    await pipeline.generate(prompt, greedy(1), on_prefill=lambda *done: told.append(done))
    assert told == sorted(told)
    assert len(told) >= 3
    assert told[-1] == (1100, 1100)


async def test_two_pipelines_on_the_same_workers_keep_to_themselves(workers, pipeline, tiny):
    async with await Pipeline.open(workers.addresses, max_tokens_hint=100) as other:
        ours = [pipeline.generate(prompt_of(n), greedy(20)) for n in (4, 30)]
        theirs = [other.generate(prompt_of(n), greedy(20)) for n in (5, 31)]
        completions = await asyncio.gather(*ours, *theirs)
    for length, completion in zip((4, 30, 5, 31), completions, strict=True):
        assert list(completion.token_ids) == tiny.greedy(prompt_of(length), 20)


async def test_closing_gives_every_block_back(workers):
    async with await Pipeline.open(workers.addresses) as pipeline:
        held = await pipeline.status()
        assert all(status.free_blocks < status.total_blocks for _, status, _ in held)
    async with await Pipeline.open(workers.addresses, max_sequences=1, max_tokens_hint=16) as again:
        for _, status, _ in await again.status():
            assert status.free_blocks == status.total_blocks - 1


async def test_workers_may_be_named_in_any_order(workers):
    async with await Pipeline.open(list(reversed(workers.addresses))) as pipeline:
        assert list(pipeline.addresses) == workers.addresses
        assert [facts.section for facts in pipeline.workers] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", ["empty"]),
        ([], ["0 tokens"]),
        ([300], ["300", "0 to 299"]),
        (prompt_of(4096), ["4096", "4095"]),
    ],
)
async def test_a_prompt_that_can_never_run_is_refused_with_the_numbers(pipeline, prompt, words):
    with pytest.raises(RequestRefused) as refused:
        await pipeline.generate(prompt)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert is_idle(pipeline)


async def test_a_prompt_that_the_kv_can_never_hold_is_refused_with_both_numbers(workers):
    async with await Pipeline.open(
        workers.addresses, max_sequences=1, max_tokens_hint=64
    ) as pipeline:
        with pytest.raises(RequestRefused, match=r"70 tokens.* 64"):
            await pipeline.generate(prompt_of(70))


async def test_no_worker_at_the_address_is_one_sentence():
    with pytest.raises(WorkerUnreachable, match=r"no worker answers at 127\.0\.0\.1:9 "):
        await Pipeline.open("127.0.0.1:9")


async def test_a_missing_worker_is_named_by_its_section(workers):
    with pytest.raises(SplitError, match=r"section 1 of 2.* missing"):
        await Pipeline.open(workers.addresses[:1])


async def test_another_model_here_than_on_the_workers_is_refused(workers):
    from engine.checkpoint_source import DEMO_MODEL

    with pytest.raises(ModelError, match=r"demo .* is not the model that the workers hold"):
        await Pipeline.open(workers.addresses, model=str(DEMO_MODEL))


async def test_a_killed_worker_ends_every_request_with_its_name_and_the_text_so_far(tiny, start):
    chain = start(*sections_of(tiny.folder, 2))
    at_once = RecoverySettings(timeout_s=0)
    async with await Pipeline.open(
        chain.addresses, max_tokens_hint=3000, recovery=at_once
    ) as pipeline:
        requests = [
            asyncio.create_task(pipeline.generate(prompt_of(n), greedy(2900))) for n in (3, 50)
        ]
        while (await pipeline.status())[1][1].steps < 20:
            pass
        chain.processes[1].kill()
        completions = await asyncio.wait_for(asyncio.gather(*requests), 10)
        for completion in completions:
            assert completion.finish_reason == "error"
            assert completion.error is not None
            assert chain.addresses[1] in completion.error
            assert "(section 1/2)" in completion.error
            assert completion.token_ids
            assert completion.text
        with pytest.raises(WorkerLost):
            await pipeline.generate(prompt_of(3))


async def test_nan_ends_only_the_request_that_made_it(tmp_path, start):
    import torch

    from tests.support.models import tiny_model
    from tests.support.tokenizers import save_tokenizer

    model = tiny_model("llama", vocab_size=VOCAB)
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, VOCAB)
    chain = start(*sections_of(tmp_path, 2))
    async with await Pipeline.open(chain.addresses) as pipeline:
        bad, good = await asyncio.gather(
            pipeline.generate([5, 77, 6], greedy(10)), pipeline.generate([5, 78, 6], greedy(10))
        )
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert "NaN" in bad.error
    assert chain.addresses[0] in bad.error
    assert good.completion_tokens == 10


async def test_a_manager_waits_for_workers_that_are_loading(
    tiny,
) -> None:
    """`manager generate` typed right after `worker`: the newcomer's first race."""
    said: list[str] = []
    with WorkerProcess("--model", str(tiny.folder), "--log-format", "json", wait=False) as worker:
        listening = await asyncio.to_thread(worker.wait_for_stderr, "listening")
        address = json.loads(listening)["address"]
        pipeline = await Pipeline.open([address], on_progress=said.append)
        async with pipeline:
            completion = await pipeline.generate([5, 6, 7], GenerationOptions(max_new_tokens=4))
    assert list(completion.token_ids) == tiny.greedy([5, 6, 7], 4)
    assert any("is still loading" in it for it in said)


async def test_a_model_without_a_tokenizer_runs_on_token_ids_and_refuses_text(tmp_path, start):
    model = save_tiny("llama", tmp_path)
    workers = start(("--model", str(tmp_path), "--kv-memory", "16MB"))
    async with await Pipeline.open(workers.addresses) as pipeline:
        completion = await pipeline.generate([5, 6, 7], greedy(6))
        with pytest.raises(ModelError, match=r"has no tokenizer, so only token ids can be prompts"):
            await pipeline.generate("some text", greedy(6))
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    assert list(completion.token_ids) == expected[0, 3:].tolist()
    assert completion.text == ""
