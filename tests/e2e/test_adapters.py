"""Adapters over real workers: chosen by name, sharing batches, added and dropped while they run."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from manager.encoding import Prompt
from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from proto.errors import AdapterError, RequestRefused
from tests.support.adapters import adapted, greedy, logits_of
from tests.support.chains import (
    VOCAB,
    TinyModel,
    Workers,
    manager,
    save_tiny_with_tokenizer,
    sections_of,
    start_all,
)

NUM_TOKENS = 12
PROMPTS = [[5, 9, 40, 7], [100, 3, 8], [17, 18, 19, 20, 21, 22], [250, 4]]


@dataclass(frozen=True)
class Served:
    """A model, adapters of it with peft's models of them, and workers that hold two of them."""

    tiny: TinyModel
    folders: dict[str, Path]
    models: dict[str | None, Any]
    workers: Workers

    def expected(self, prompt: list[int], adapter: str | None) -> list[int]:
        return greedy(self.models[adapter], prompt, NUM_TOKENS)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    tiny = save_tiny_with_tokenizer(folder / "model", max_position_embeddings=1024)
    settings: dict[str, dict[str, Any]] = {
        "medicine": {},
        "law": {"target_modules": ["q_proj", "v_proj", "lm_head"], "use_dora": True},
        "verse": {"r": 2, "use_rslora": True},
    }
    folders = {name: folder / name for name in settings}
    models: dict[str | None, Any] = {None: tiny.model}
    for seed, (name, values) in enumerate(settings.items()):
        models[name] = adapted(tiny.model, folders[name], seed=seed, **values)
    held = [f"--adapter={name}={folders[name]}" for name in ("medicine", "law")]
    with ExitStack() as stack:
        lines = sections_of(tiny.folder, 2, "--kv-memory", "16MB", *held)
        yield Served(tiny, folders, models, start_all(stack, *lines))


@pytest.fixture
def chain(served: Served) -> Iterator[Workers]:
    """Two workers without an adapter, for one test."""
    with ExitStack() as stack:
        yield start_all(stack, *sections_of(served.tiny.folder, 2, "--kv-memory", "16MB"))


def options(adapter: str | None = None, **values: Any) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=values.pop("max_new_tokens", NUM_TOKENS),
        ignore_eos=True,
        adapter=adapter,
        **values,
    )


def on_workers(workers: Workers, check: Any, **settings: Any) -> None:
    async def run() -> None:
        async with await Pipeline.open(workers.addresses, **settings) as pipeline:
            await check(pipeline)

    asyncio.run(run())


# --- what comes out --------------------------------------------------------------------------


def test_sequences_with_different_adapters_and_none_share_steps_and_equal_peft(served):
    users = ["medicine", None, "law", "medicine", None, "law", "law", "medicine"]
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(len(users))]

    async def check(pipeline: Pipeline) -> None:
        done = await asyncio.gather(
            *(
                pipeline.generate(prompt, options(user))
                for prompt, user in zip(prompts, users, strict=True)
            )
        )
        for prompt, user, completion in zip(prompts, users, done, strict=True):
            assert completion.error is None
            assert list(completion.token_ids) == served.expected(prompt, user), user

    on_workers(served.workers, check)
    assert len({tuple(served.expected(PROMPTS[0], user)) for user in served.models}) == 4


def test_prompts_are_scored_under_their_adapters_beside_others_in_a_step(served):
    users = ["medicine", None, "law"]  # the last one changes the lm_head
    scored = [options(user, prompt_logprobs=1) for user in users]
    asked = [*scored, *(options(user) for user in users)]

    async def check(pipeline: Pipeline) -> None:
        done = await asyncio.gather(*(pipeline.generate(PROMPTS[2], it) for it in asked))
        for user, completion in zip(users, done, strict=False):
            whole = torch.log_softmax(logits_of(served.models[user], PROMPTS[2]), dim=-1)
            own = [float(whole[at, token]) for at, token in enumerate(PROMPTS[2][1:])]
            said = list(completion.prompt_logprobs)
            assert [it.token_id for it in said] == PROMPTS[2][1:]
            assert [it.logprob for it in said] == pytest.approx(own, abs=1e-4), user
            best = whole[:-1].argmax(dim=-1).tolist()
            assert [it.top[0][0] for it in said] == best
            assert list(completion.token_ids) == served.expected(PROMPTS[2], user), user

    on_workers(served.workers, check)


def test_a_prompt_s_beginning_is_shared_within_an_adapter_and_never_across(served):
    prompt = [(7 * at) % (VOCAB - 10) for at in range(40)]

    async def check(pipeline: Pipeline) -> None:
        shared = []
        for user in ("medicine", None, "law", "medicine", None, "law"):
            before = pipeline.stats().shared_tokens
            completion = await pipeline.generate(prompt, options(user))
            assert list(completion.token_ids) == served.expected(prompt, user)
            shared.append(pipeline.stats().shared_tokens - before)
        assert shared == [0, 0, 0, 32, 32, 32]

    on_workers(served.workers, check)


def test_a_sequence_that_was_put_off_is_computed_again_with_its_adapter(served):
    """More than the KV of the lease holds: the youngest give up their blocks, and come back."""
    users = ["medicine", "law", None, "law", "medicine", None]
    prompts = [PROMPTS[at % len(PROMPTS)] for at in range(len(users))]

    async def check(pipeline: Pipeline) -> None:
        done = await asyncio.gather(
            *(
                pipeline.generate(prompt, options(user, max_new_tokens=60))
                for prompt, user in zip(prompts, users, strict=True)
            )
        )
        assert pipeline.stats().preemptions > 0
        for prompt, user, completion in zip(prompts, users, done, strict=True):
            assert list(completion.token_ids) == greedy(served.models[user], prompt, 60)

    on_workers(served.workers, check, max_sequences=2, max_tokens_hint=90)


def test_generate_takes_an_adapter_by_name(served, call):
    words = ("generate", "the fox", "--workers", served.workers.option, "--json")
    words += ("--max-new-tokens", "6")
    answer = call(*words, "--adapter", "law")
    assert answer.returncode == 0, answer.stderr
    prompt = served.tiny.tokenizer("the fox")["input_ids"]
    ours = json.loads(answer.stdout)["token_ids"]
    assert ours == greedy(served.models["law"], prompt, 6)[: len(ours)]
    assert ours != json.loads(call(*words).stdout)["token_ids"]


def test_batch_takes_an_adapter_for_all_rows_and_one_for_each(served, call, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "the fox"},
        {"prompt": "the fox", "adapter": "law"},
        {"prompt": "the fox", "adapter": ""},
        {"prompt": "the fox", "adapter": str(served.folders["verse"])},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("batch", "--prompts", str(prompts), "--workers", served.workers.option)
    words += ("--max-new-tokens", "6")
    answer = call(*words, "--adapter", "medicine")
    assert answer.returncode == 0, answer.stderr
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    prompt = served.tiny.tokenizer("the fox")["input_ids"]
    for result, user in zip(results, ("medicine", "law", None, "verse"), strict=True):
        expected = greedy(served.models[user], prompt, 6)
        text = served.tiny.tokenizer.decode([*prompt, *expected], skip_special_tokens=True)
        assert result["text"] and text.startswith("the fox" + result["text"])
    said = [result.get("adapter") for result in results]
    assert said == ["medicine", "law", None, str(served.folders["verse"])]
    listed = json.loads(call("adapters", "--workers", served.workers.option, "--json").stdout)
    assert [it["name"] for it in listed[0]["adapters"]] == ["law", "medicine"]


@pytest.mark.parametrize("spelling", ["folder", "named"])
def test_spawned_workers_start_with_the_folder_that_was_named(spelling, served, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the fox\n")
    folder = served.folders["verse"]
    said = str(folder) if spelling == "folder" else f"mine={folder}"
    answer = manager(
        *("batch", "--prompts", str(prompts), "--spawn", "2", "--max-new-tokens", "6"),
        *("--model", str(served.tiny.folder), "--adapter", said),
    )
    assert answer.returncode == 0, answer.stderr
    prompt = served.tiny.tokenizer("the fox")["input_ids"]
    expected = greedy(served.models["verse"], prompt, 6)
    text = served.tiny.tokenizer.decode([*prompt, *expected], skip_special_tokens=True)
    assert text.startswith("the fox" + json.loads(answer.stdout)["text"])


def test_a_batch_goes_on_only_with_the_adapter_it_was_begun_with(served, call, tmp_path):
    """By content: the folder is the same, what is in it was trained anew."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "results.jsonl"
    prompts.write_text("the fox\n" * 2)
    folder = tmp_path / "adapter"
    shutil.copytree(served.folders["verse"], folder)
    words = ("batch", "--prompts", str(prompts), "--workers", served.workers.option)
    words += ("--adapter", str(folder), "--output", str(output), "--max-new-tokens", "2")
    assert call(*words).returncode == 0
    lines = output.read_text().splitlines()
    output.unlink()
    made_by = {"partial": 1, "replaces": False, "made_by": {"adapters": {str(folder): "0" * 32}}}
    output.with_name("results.jsonl.partial").write_text(json.dumps(made_by) + "\n")
    answer = call(*words)
    assert answer.returncode == 2 and len(lines) == 2
    assert "was begun with" in answer.stderr


# --- what the workers hold -------------------------------------------------------------------


def test_adapters_and_workers_show_what_is_held(served, call):
    listed = call("adapters", "--workers", served.workers.option)
    assert listed.returncode == 0 and listed.stderr == ""
    for name in ("medicine", "law"):
        assert str(served.folders[name]) in listed.stdout
    shown = call("workers", "--workers", served.workers.option)
    assert "law, medicine (" in shown.stdout
    said = json.loads(call("workers", "--workers", served.workers.option, "--json").stdout)
    for worker in said:
        assert worker["status"]["adapters"] == 2
        held = sum(adapter["num_bytes"] for adapter in worker["adapters"])
        assert worker["status"]["adapter_bytes"] == held > 0


def test_an_adapter_is_added_and_dropped_while_sequences_run(served, chain, call):
    folder = served.folders["medicine"]

    async def check(pipeline: Pipeline) -> None:
        running = asyncio.ensure_future(pipeline.generate(PROMPTS[0], options(max_new_tokens=200)))
        assert (await command("add", f"mine={folder}")).returncode == 0
        done = await pipeline.generate(PROMPTS[1], options("mine"))
        assert list(done.token_ids) == served.expected(PROMPTS[1], "medicine")
        assert (await command("drop", "mine")).returncode == 0
        with pytest.raises(RequestRefused, match="there is no adapter mine here"):
            await pipeline.generate(PROMPTS[1], options("mine"))
        completion = await running
        assert completion.error is None
        assert list(completion.token_ids) == greedy(served.tiny.model, PROMPTS[0], 200)

    async def command(*words: str) -> Any:
        return await asyncio.to_thread(manager, "adapters", *words, "--workers", chain.option)

    on_workers(chain, check)
    assert "hold no adapter" in call("adapters", "--workers", chain.option).stderr


def test_a_dropped_adapter_stays_until_its_last_sequence_ends_and_its_name_is_free(
    served, chain, call
):
    """The old one and the new one of the same name run side by side."""
    assert add(call, chain, "mine", served.folders["medicine"]).returncode == 0

    async def check(pipeline: Pipeline) -> None:
        pieces = pipeline.stream(PROMPTS[0], options("mine", max_new_tokens=120))
        tokens = list((await anext(pieces)).token_ids)
        dropped = await asyncio.to_thread(
            manager, "adapters", "drop", "mine", "--workers", chain.option
        )
        assert "1 manager still use" in dropped.stdout
        added = await asyncio.to_thread(
            manager,
            *("adapters", "add", f"mine={served.folders['law']}", "--workers", chain.option),
        )
        assert added.returncode == 0, added.stderr
        async with await Pipeline.open(chain.addresses) as other:
            done = await other.generate(PROMPTS[0], options("mine"))
        assert list(done.token_ids) == served.expected(PROMPTS[0], "law")
        status = (await pipeline.status())[0][1]
        assert status.adapters == 2
        async for piece in pieces:
            tokens += piece.token_ids
        assert tokens == greedy(served.models["medicine"], PROMPTS[0], 120)
        after = (await pipeline.status())[0][1]
        assert (after.adapters, after.adapter_bytes < status.adapter_bytes) == (1, True)
        # A new request of the same pipeline gets what the name means now.
        again = await pipeline.generate(PROMPTS[0], options("mine"))
        assert list(again.token_ids) == served.expected(PROMPTS[0], "law")

    on_workers(chain, check)


def test_when_one_worker_cannot_load_it_none_has_it(served, start, call, tmp_path):
    """The second worker holds another adapter of this name already; that one stays."""
    lines = list(sections_of(served.tiny.folder, 2, "--kv-memory", "16MB"))
    lines[1] = (*lines[1], "--adapter", f"mine={served.folders['law']}")
    chain = start(*lines)
    answer = add(call, chain, "mine", served.folders["medicine"])
    assert answer.returncode == 2
    assert f"worker {chain.addresses[1]}: an adapter mine is here already" in answer.stderr
    listed = json.loads(call("adapters", "--workers", chain.option, "--json").stdout)
    assert [[it["path"] for it in worker["adapters"]] for worker in listed] == [
        [],
        [str(served.folders["law"])],
    ]
    shown = call("adapters", "--workers", chain.option)
    assert f"mine is missing on {chain.addresses[0]}" in shown.stderr
    refused = call("generate", "a", "--workers", chain.option, "--adapter", "mine")
    assert refused.returncode == 2 and chain.addresses[0] in refused.stderr


def test_the_same_name_with_other_content_on_two_workers_is_refused_by_name(served, start, call):
    lines = [
        (*line, "--adapter", f"mine={served.folders[name]}")
        for line, name in zip(
            sections_of(served.tiny.folder, 2, "--kv-memory", "16MB"),
            ("medicine", "law"),
            strict=True,
        )
    ]
    chain = start(*lines)

    async def check(pipeline: Pipeline) -> None:
        with pytest.raises(RequestRefused, match="mine is not the same on all workers"):
            await pipeline.generate(PROMPTS[0], options("mine"))
        done = await pipeline.generate(PROMPTS[0], options())
        assert list(done.token_ids) == served.expected(PROMPTS[0], None)
        with pytest.raises(AdapterError, match=chain.addresses[1]):
            await pipeline.provide_adapters(["mine"])

    on_workers(chain, check)
    assert "not the same on all workers" in call("adapters", "--workers", chain.option).stderr


def test_an_adapter_that_was_loaded_for_a_pipeline_goes_with_it(served, chain, call):
    async def check(pipeline: Pipeline) -> None:
        folder = str(served.folders["verse"])
        await pipeline.provide_adapters([folder])
        done = await pipeline.generate(PROMPTS[0], options(folder))
        assert list(done.token_ids) == served.expected(PROMPTS[0], "verse")
        assert all(status.adapters == 1 for _, status, _ in await pipeline.status())

    on_workers(chain, check)
    said = json.loads(call("workers", "--workers", chain.option, "--json").stdout)
    assert [worker["status"]["adapters"] for worker in said] == [0, 0]


def add(call: Any, chain: Workers, name: str, folder: Path) -> Any:
    return call("adapters", "add", f"{name}={folder}", "--workers", chain.option)


# --- one sentence ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "a", "--adapter", "poetry"], "no adapter of this name (held: law, medicine)"),
        (["generate", "a", "--adapter", "/nowhere/at/all"], "/nowhere/at/all is not there"),
        (["generate", "a", "--adapter", ""], "it takes an adapter's name"),
        (["adapters", "add", "mine"], "is not NAME=DIR"),
        (["adapters", "add", "a b=/x"], "cannot be an adapter's name"),
        (["adapters", "add", "mine=nowhere"], "give the absolute path"),
        (["adapters", "add", "mine=/nowhere"], "/nowhere is not there"),
        (["adapters", "add", "law=/nowhere"], "an adapter law is here already"),
        (["adapters", "drop", "poetry"], "there is no adapter poetry here (held: law, medicine)"),
        (["adapters", "drop", "a b"], "cannot be an adapter's name"),
        (["adapters", "add", f"mine=/{'x' * 2000}"], "is too long"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(words, said, served, call):
    answer = call(*words, "--workers", served.workers.option)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_an_adapter_of_another_model_is_refused_on_the_way_in(served, chain, call, tmp_path):
    from tests.support.models import tiny_model

    adapted(tiny_model("llama", hidden_size=64), tmp_path / "wide", target_modules=["q_proj"])
    answer = add(call, chain, "wide", tmp_path / "wide")
    assert answer.returncode == 2
    assert "from 64 to 64 features, and the model's own goes from 32 to 32" in answer.stderr
    assert "hold no adapter" in call("adapters", "--workers", chain.option).stderr


def test_the_workers_setting_of_the_same_name_is_not_the_managers(served, call):
    """In a shell where workers are started, COMBOIO_ADAPTER says what they hold."""
    words = ("generate", "the fox", "--workers", served.workers.option, "--json")
    words += ("--max-new-tokens", "4")
    plain = call(*words)
    answer = call(*words, env={"COMBOIO_ADAPTER": f"law={served.folders['law']},x=/nowhere"})
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]


def test_spawn_knows_no_names(call, served):
    answer = call(
        *("generate", "a", "--spawn", "1", "--model", str(served.tiny.folder)),
        *("--adapter", "medicine"),
    )
    assert answer.returncode == 2
    assert "--spawn starts workers that hold no adapter yet" in answer.stderr


def test_a_llama_server_takes_none(call):
    answer = call(
        *("generate", "a", "--server", "http://127.0.0.1:9", "--adapter", "medicine"),
    )
    assert answer.returncode == 2
    assert "--adapter medicine means nothing to a llama-server" in answer.stderr


def test_a_token_prompt_of_a_closed_pipeline_leaves_no_adapter_in_use(served):
    async def check(pipeline: Pipeline) -> None:
        with pytest.raises(RequestRefused):
            await pipeline.generate(Prompt(()), options("law"))
        async with await Pipeline.open(served.workers.addresses) as other:
            held = await asyncio.gather(*(link.adapters() for link in other._links))
        assert [it.leases for adapters in held for it in adapters] == [0, 0, 0, 0]

    on_workers(served.workers, check)
