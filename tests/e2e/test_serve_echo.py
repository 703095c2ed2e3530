"""`echo` with `logprobs`: how likely a prompt is, against transformers' own numbers in float32."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch

from tests.support.chains import TinyModel
from tests.support.serving import Server

PLAIN = "/v1/completions"
# Longer than a chunk of a prompt, and than two of a pipeline of two stages.
LONG = [5 + at * at % 290 for at in range(1500)]
TEXT = "the lazy dog 🚂 café"


def complete(server: Server, **values: Any) -> Any:
    body = {"max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 3, **values}
    got = server.post(PLAIN, body)
    assert got.status == 200, got.body
    return got.json


def expected(tiny: TinyModel, tokens: list[int]) -> torch.Tensor:
    """(tokens, vocab_size): what the whole model says behind each token, in float32."""
    with torch.inference_mode():
        return torch.log_softmax(tiny.model(torch.tensor([tokens])).logits[0].float(), dim=-1)


def shown(tiny: TinyModel, token: int) -> str:
    """A token as the server writes it; the byte 0xFF, which is in no text, is left out."""
    name = tiny.tokenizer.convert_ids_to_tokens(token)
    return "" if name == "ÿ" else str(tiny.tokenizer.decode([token]))


def check_prompt(tiny: TinyModel, logprobs: Any, tokens: list[int], top: int = 3) -> None:
    """The prompt's part of an answer is what transformers says, within 1e-4."""
    whole = expected(tiny, tokens)
    own = [float(whole[at, token]) for at, token in enumerate(tokens[1:])]
    best = whole.topk(top)
    numbers = logprobs["token_logprobs"][: len(tokens)]
    assert numbers[0] is None and numbers[1:] == pytest.approx(own, abs=1e-4)
    tops = logprobs["top_logprobs"][: len(tokens)]
    assert tops[0] is None
    texts = [shown(tiny, token) for token in tokens]
    assert logprobs["tokens"][: len(tokens)] == texts
    for at, said in enumerate(tops[1:]):
        # Tokens that are halves of characters look alike: the likeliest of them is said.
        wanted: dict[str, float] = {}
        for token, value in zip(best.indices[at].tolist(), best.values[at].tolist(), strict=True):
            wanted.setdefault(shown(tiny, token), value)
        wanted.setdefault(texts[at + 1], own[at])
        assert said == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("tokens", [LONG, [7, 8], [9]], ids=["chunks", "short", "one"])
def test_a_prompts_logprobs_are_those_of_the_whole_model(
    server: Server, tiny: TinyModel, tokens: list[int]
) -> None:
    done = complete(server, prompt=tokens)
    (choice,) = done["choices"]
    check_prompt(tiny, choice["logprobs"], tokens)
    assert choice["text"] == tiny.tokenizer.decode(tokens)
    assert choice["finish_reason"] == "length"
    assert done["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 0,
        "total_tokens": len(tokens),
    }


def test_what_follows_a_scored_prompt_is_what_follows_it_anyway(
    server: Server, tiny: TinyModel
) -> None:
    plain = complete(server, prompt=LONG, max_tokens=6, echo=False)["choices"][0]
    both = complete(server, prompt=LONG, max_tokens=6)["choices"][0]
    check_prompt(tiny, both["logprobs"], LONG)
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        part = both["logprobs"][name]
        assert len(part) == len(LONG) + 6
        if name == "tokens":
            assert part[len(LONG) :] == plain["logprobs"][name]
    assert both["logprobs"]["token_logprobs"][len(LONG) :] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert both["text"].endswith(plain["text"])


def test_offsets_are_places_in_the_text_that_the_client_gets(
    server: Server, tiny: TinyModel
) -> None:
    ids = tiny.tokenizer(TEXT)["input_ids"]
    for prompt in (TEXT, ids):
        choice = complete(server, prompt=prompt, max_tokens=5, ignore_eos=True)["choices"][0]
        check_prompt(tiny, choice["logprobs"], ids)
        offsets = choice["logprobs"]["text_offset"]
        assert choice["text"].startswith(TEXT) and offsets == sorted(offsets)
        assert offsets[0] == 0 and offsets[len(ids)] == len(TEXT)
        prompts = zip(choice["logprobs"]["tokens"][: len(ids)], offsets, offsets[1:], strict=False)
        for token, start, end in prompts:
            assert "\ufffd" in token or choice["text"][start:end] == token


def test_a_stream_begins_with_the_prompt_and_its_logprobs(server: Server) -> None:
    asked = {"prompt": TEXT, "max_tokens": 4, "n": 2, "temperature": 1.0, "seed": 3}
    whole = complete(server, **asked)
    body = {"echo": True, "logprobs": 3, **asked, "stream": True}
    events = server.post(PLAIN, body).events
    for index, choice in enumerate(whole["choices"]):
        mine = [it["choices"][0] for it in events if it["choices"][0]["index"] == index]
        assert mine[0]["text"] == TEXT and mine[0]["logprobs"]["token_logprobs"][0] is None
        assert "".join(it["text"] for it in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            joined = [one for it in mine for one in it["logprobs"][name]]
            assert joined == choice["logprobs"][name]
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]
    only = server.post(PLAIN, {**body, "max_tokens": 0}).events
    assert {it["choices"][0]["index"] for it in only} == {0, 1}
    assert [it["choices"][0]["finish_reason"] for it in only if it["choices"][0]["text"]][1:] == [
        "length"
    ]


def test_lists_of_prompts_and_choices_have_each_their_own(server: Server, tiny: TinyModel) -> None:
    prompts = [LONG[:40], LONG[40:43], [9]]
    done = complete(server, prompt=prompts, n=2, max_tokens=2, ignore_eos=True, logprobs=1)
    assert [choice["index"] for choice in done["choices"]] == list(range(6))
    for at, choice in enumerate(done["choices"]):
        check_prompt(tiny, choice["logprobs"], prompts[at // 2], top=1)
        assert len(choice["logprobs"]["tokens"]) == len(prompts[at // 2]) + 2
    assert done["usage"]["prompt_tokens"] == 44 and done["usage"]["completion_tokens"] == 12
    none = complete(server, prompt=prompts, n=2, logprobs=0)["choices"]
    assert [choice["finish_reason"] for choice in none] == 6 * ["length"]
    for at, choice in enumerate(none):
        assert choice["logprobs"]["top_logprobs"] is None
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompts[at // 2])


def test_a_prompt_that_another_one_computed_is_scored_all_the_same(
    server: Server, tiny: TinyModel
) -> None:
    prompt = LONG[::-1][:200]
    complete(server, prompt=prompt, echo=False, max_tokens=1)
    check_prompt(tiny, complete(server, prompt=prompt)["choices"][0]["logprobs"], prompt)
    shared = server.metric("comboio_shared_prompt_tokens_total")
    complete(server, prompt=prompt, echo=False, max_tokens=1)
    assert server.metric("comboio_shared_prompt_tokens_total") > shared


def test_a_prompt_may_fill_the_context_when_nothing_follows_it(server: Server) -> None:
    prompt = (3 * LONG)[:4096]
    done = complete(server, prompt=prompt, logprobs=0)["choices"][0]
    assert len(done["logprobs"]["token_logprobs"]) == 4096
    got = server.post(PLAIN, {"prompt": [*prompt, 1], "max_tokens": 0, "echo": True, "logprobs": 0})
    assert got.status == 400 and "4096" in got.error and "4097" in got.error


def test_the_likelihood_of_a_continuation_as_evaluation_harnesses_ask_for_it(
    server: Server, tiny: TinyModel
) -> None:
    """lm-evaluation-harness, `local-completions`: a token is drawn and left out again."""
    context, ends = LONG[:30], [[11, 12, 13], [14]]
    ends.append(tiny.greedy(context, 3))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        done = client.completions.create(
            model=server.model,
            prompt=[context + end for end in ends],
            temperature=0,
            max_tokens=1,
            logprobs=1,
            seed=1234,
            echo=True,
        )
    assert len(done.choices) == 3
    greedy = []
    for choice, end in zip(done.choices, ends, strict=True):
        assert choice.logprobs is not None
        numbers = choice.logprobs.token_logprobs or []
        tops = choice.logprobs.top_logprobs or []
        whole = expected(tiny, context + end)
        own = sum(float(whole[29 + at, token]) for at, token in enumerate(end))
        assert sum(numbers[30:-1]) == pytest.approx(own, abs=1e-4)
        greedy.append(
            all(
                number == max(top.values())
                for number, top in zip(numbers[30:-1], tops[30:-1], strict=True)
            )
        )
    assert greedy == [False, False, True]


def test_the_best_of_some_texts_is_the_likeliest_a_token(server: Server) -> None:
    asked = {"prompt": [TEXT, LONG[:20]], "temperature": 1.5, "seed": 5, "max_tokens": 6}
    asked = {**asked, "echo": False, "prompt": TEXT, "ignore_eos": True}
    every = complete(server, **asked, n=4)["choices"]

    def mean(choice: Any) -> float:
        numbers = choice["logprobs"]["token_logprobs"]
        return sum(numbers) / len(numbers)

    best = sorted(every, key=mean, reverse=True)
    done = complete(server, **asked, n=2, best_of=4)
    assert [it["text"] for it in done["choices"]] == [it["text"] for it in best[:2]]
    assert [it["index"] for it in done["choices"]] == [0, 1]
    assert done["usage"]["completion_tokens"] == 24
    bare = complete(server, **{**asked, "logprobs": None, "echo": True}, best_of=4)["choices"]
    assert [it["text"] for it in bare] == [TEXT + best[0]["text"]] and bare[0]["logprobs"] is None
