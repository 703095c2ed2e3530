"""`manager serve` over real workers, called by the `openai` client, curl, and bare HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
import torch

from tests.support.chains import TinyModel, Workers
from tests.support.processes import ROOT
from tests.support.serving import Server, until

PROMPT = [5, 9, 40, 7]
LEFT_BYTES = 10_000  # by one stream, at most: cycles wait to be collected, allocators round


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(server: Server, **values: Any) -> Any:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **values}
    got = server.post("/v1/completions", body)
    assert got.status == 200, got.body
    return got.json


# --- texts -----------------------------------------------------------------------------------


def test_a_completion_is_what_the_model_itself_generates(
    client: openai.OpenAI, server: Server, tiny: TinyModel
) -> None:
    done = client.completions.create(model=server.model, prompt=PROMPT, max_tokens=8, temperature=0)
    expected = tiny.greedy(PROMPT, 8)
    whole = tiny.tokenizer.decode(PROMPT + expected)
    assert done.object == "text_completion" and done.model == server.model
    assert whole.endswith(done.choices[0].text) and done.choices[0].text
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 8)
    assert done.choices[0].finish_reason == "length"


def test_a_conversation_is_answered_in_the_models_chat_template(
    client: openai.OpenAI, server: Server, tiny: TinyModel
) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "the quick "}]},
    ]
    chat = client.chat.completions.create(
        model=server.model, messages=messages, max_completion_tokens=9, temperature=0
    )
    text = "<|system|>Be brief.<|end|><|user|>the quick <|end|><|assistant|>"
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = client.completions.create(model=server.model, prompt=ids, max_tokens=9, temperature=0)
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None and chat.usage.prompt_tokens == len(ids)
    assert chat.choices[0].message.content == plain.choices[0].text.lstrip()


def test_a_stream_is_the_same_text_with_its_usage_at_the_end(
    client: openai.OpenAI, server: Server
) -> None:
    asked: Any = {
        "model": server.model,
        "messages": [{"role": "user", "content": "a lazy dog"}],
        "max_tokens": 20,
        "temperature": 0.9,
        "seed": 11,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)
    assert text == whole.choices[0].message.content
    reasons = [it.choices[0].finish_reason for it in chunks if it.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_two_hundred_streams_at_once_are_each_what_they_are_alone_and_leave_nothing(
    server: Server,
) -> None:
    process = psutil.Process(server.process.pid)
    prompts = [[3 + at % 7, 20 + at, 7 + at % 11] for at in range(40)]
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def text(at: int) -> tuple[str, int]:
            stream = await client.completions.create(
                model=server.model,
                prompt=prompts[at % 40],
                max_tokens=12,
                temperature=0,  # a draw may lie between two tokens by less than float32 tells apart
                stream=True,
                stream_options={"include_usage": True},
            )
            said, tokens = "", 0
            async for chunk in stream:
                said += chunk.choices[0].text if chunk.choices else ""
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return said, tokens

        alone = [await text(at) for at in range(40)]
        resident = []
        for _ in range(3):
            together = await asyncio.gather(*(text(at) for at in range(200)))
            assert together == alone * 5
            resident.append(process.memory_info().rss)
    assert len({said for said, _ in alone}) > 30
    assert resident[2] - resident[0] < 400 * LEFT_BYTES, resident  # 400 streams later


def test_choices_differ_and_a_seed_gives_the_same_ones_again(server: Server) -> None:
    asked = {"n": 3, "temperature": 1.5, "seed": 5, "prompt": ["the fox", "a dog"]}
    first, again = complete(server, **asked), complete(server, **asked)
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert [choice["index"] for choice in first["choices"]] == list(range(6))
    assert len(set(texts)) == 6
    assert first["usage"]["completion_tokens"] <= 48


def test_prompts_may_be_texts_or_token_ids_and_lists_of_them(
    server: Server, tiny: TinyModel
) -> None:
    ids = [tiny.tokenizer(text)["input_ids"] for text in ("the fox", "a dog")]
    texts = [
        [choice["text"] for choice in complete(server, prompt=prompt)["choices"]]
        for prompt in (["the fox", "a dog"], ids)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    assert complete(server, prompt="the fox")["choices"][0]["text"] == texts[0][0]
    assert complete(server, prompt=ids[1])["choices"][0]["text"] == texts[0][1]


def test_a_stop_text_ends_the_text_and_is_not_part_of_it(server: Server) -> None:
    text = complete(server, max_tokens=12)["choices"][0]["text"]
    stop = text[4:6]
    choice = complete(server, max_tokens=12, stop=[stop, "\x00never"])["choices"][0]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_echo_puts_the_prompt_in_front(server: Server) -> None:
    plain = complete(server, prompt="the fox")["choices"][0]["text"]
    echoed = complete(server, prompt="the fox", echo=True)["choices"][0]["text"]
    assert echoed == "the fox" + plain
    only = complete(server, prompt="the fox", echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == "the fox" and only["usage"]["completion_tokens"] == 0
    events = server.post(
        "/v1/completions",
        {"prompt": "the fox", "echo": True, "max_tokens": 8, "temperature": 0, "stream": True},
    ).events
    assert "".join(it["choices"][0]["text"] for it in events) == echoed


# --- sampling --------------------------------------------------------------------------------


def test_presence_and_frequency_penalties_are_openais_formula(
    server: Server, tiny: TinyModel
) -> None:
    asked = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"17": 3.0}}
    tokens: list[int] = []
    with torch.inference_mode():
        for _ in range(14):
            logits = tiny.model(torch.tensor([PROMPT + tokens])).logits[0, -1].clone()
            logits[17] += 3.0
            for token in set(tokens):
                logits[token] -= 1.5 + 0.5 * tokens.count(token)
            tokens.append(int(logits.argmax()))
    choice = complete(server, max_tokens=14, logprobs=0, ignore_eos=True, **asked)["choices"][0]
    texts = [tiny.tokenizer.decode([token]) for token in tokens]
    assert choice["logprobs"]["tokens"] == texts


def test_a_bias_forbids_and_forces_tokens(server: Server, tiny: TinyModel) -> None:
    forced = complete(server, logit_bias={"50": 100}, max_tokens=4)["choices"][0]["text"]
    assert forced == 4 * tiny.tokenizer.decode([50])
    first = tiny.greedy(PROMPT, 1)[0]
    banned = complete(server, logit_bias={str(first): -100}, logprobs=0)["choices"][0]
    assert banned["logprobs"]["tokens"][0] != tiny.tokenizer.decode([first])


def test_logprobs_are_the_models_own(
    client: openai.OpenAI, server: Server, tiny: TinyModel
) -> None:
    chat = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "x"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    ids = tiny.tokenizer("<|user|>x<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = torch.log_softmax(tiny.model(torch.tensor([ids])).logits[0, -1].double(), -1)
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    first = chat.choices[0].logprobs.content[0]
    best = expected.topk(4)
    assert [it.logprob for it in first.top_logprobs] == pytest.approx(
        best.values.tolist(), abs=1e-4
    )
    assert first.logprob == first.top_logprobs[0].logprob
    assert first.bytes is not None
    assert bytes(first.bytes).decode("utf-8", "replace") == first.token
    assert len(chat.choices[0].logprobs.content) == 3


# --- refusals --------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
PLAIN = "/v1/completions"
USER = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (PLAIN, b"{", 400, "the body is no JSON"),
        (PLAIN, b"\xff", 400, "the body is no JSON"),
        (PLAIN, [], 400, "Expected `object`"),
        (PLAIN, {}, 400, "missing required field `prompt`"),
        (PLAIN, {"prompt": 5}, 400, "prompt: expected `str | array`"),
        (PLAIN, {"prompt": []}, 400, "prompt is an empty list"),
        (PLAIN, {"prompt": [1, "x"]}, 400, "prompt mixes"),
        (PLAIN, {"prompt": [[]]}, 400, "a prompt has no token"),
        (PLAIN, {"prompt": ""}, 400, "the prompt is empty"),
        (PLAIN, {"prompt": [300]}, 400, "token id 300 is none of the model's, 0 to 299"),
        (PLAIN, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
        (PLAIN, {"prompt": "x", "max_tokens": -1}, 400, "max_tokens is -1"),
        (PLAIN, {"prompt": "x", "max_tokens": "5"}, 400, "max_tokens: expected `int | null`"),
        (PLAIN, {"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
        (PLAIN, {"prompt": "x", "top_p": 0}, 400, "top_p is 0"),
        (PLAIN, {"prompt": "x", "n": 0}, 400, "n is 0"),
        (PLAIN, {"prompt": ["x"] * 600}, 400, "600 texts in one request"),
        (PLAIN, {"prompt": "x", "stop": ["a"] * 17}, 400, "stop has 17 texts"),
        (PLAIN, {"prompt": "x", "logit_bias": {"x": 1}}, 400, "'x' is no token id"),
        (PLAIN, {"prompt": "x", "logit_bias": {"300": 1}}, 400, "token id 300 is none"),
        (PLAIN, {"prompt": "x", "logit_bias": {"3": 101}}, 400, "logit_bias of token 3 is 101"),
        (PLAIN, {"prompt": "x", "presence_penalty": 3}, 400, "presence_penalty is 3"),
        (PLAIN, {"prompt": "x", "logprobs": 21}, 400, "logprobs is 21"),
        (PLAIN, {"prompt": "x", "suffix": "y"}, 400, "has no tokens that mark a gap in a text"),
        (PLAIN, {"prompt": "x", "best_of": 0}, 400, "best_of is 0; it takes a whole number from n"),
        (PLAIN, {"prompt": "x", "n": 3, "best_of": 2}, 400, "best_of is 2; it takes"),
        (PLAIN, {"prompt": "x", "best_of": 2, "stream": True}, 400, "so leave stream out"),
        (PLAIN, {"prompt": "x", "model": "nobody"}, 404, "'nobody' does not exist here"),
        (CHAT, {"messages": []}, 400, "messages has 0 entries"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role is 'king'"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "the conversation is empty"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "a part of type 'image_url'",
        ),
        (CHAT, {"messages": USER, "top_logprobs": 2}, 400, "needs logprobs"),
        (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, 400, "of type 'xml'"),
        (CHAT, {"messages": USER, "max_tokens": 5000}, 400, "context is 4096 tokens; the request"),
        ("/tokenize", {}, 400, "either prompt"),
        ("/detokenize", {"tokens": [-1]}, 400, "token id -1"),
        ("/v1/nothing", {}, 404, "there is no /v1/nothing here"),
        ("/v1/models", {}, 405, "/v1/models does not take POST"),
    ],
)
def test_what_cannot_be_is_refused_in_openais_shape(
    server: Server, path: str, body: Any, status: int, words: str
) -> None:
    got = server.post(path, body)
    assert (got.status, words in got.error) == (status, True), got.body


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    client: openai.OpenAI, server: Server
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server.model, prompt=[5] * 4100, max_tokens=7)
    assert caught.value.code == "context_length_exceeded"
    for number in ("4096", "4100", "7"):
        assert number in str(caught.value)


def test_unknown_fields_are_left_alone_and_nulls_are_defaults(server: Server) -> None:
    nulls = dict.fromkeys(("n", "stop", "seed", "top_p", "logit_bias", "stream", "user"))
    plain = complete(server)["choices"]
    assert complete(server, store=True, metadata={"a": 1}, **nulls)["choices"] == plain


def test_pages_of_other_sites_cannot_use_the_server(server: Server) -> None:
    assert server.get("/health", origin="https://evil.example").status == 403
    assert server.get("/health", host="evil.example").status == 403
    assert server.get("/health", host="[::1").status == 403
    assert server.get("/health", origin="http://[::1").status == 403
    assert server.get("/health", origin=server.url).status == 200
    assert "access-control-allow-origin" not in server.get("/health", origin=server.url).headers


# --- the other paths -------------------------------------------------------------------------


def test_models_are_listed_and_found(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("nobody")


def test_texts_become_tokens_and_tokens_texts(server: Server, tiny: TinyModel) -> None:
    text = "the lazy 🚂 café"
    got = server.post("/tokenize", {"prompt": text}).json
    assert got["tokens"] == tiny.tokenizer(text)["input_ids"]
    assert got["count"] == len(got["tokens"]) and got["max_model_len"] == 4096
    assert server.post("/detokenize", {"tokens": got["tokens"]}).json == {"prompt": text}
    chat = server.post("/tokenize", {"messages": USER}).json["tokens"]
    assert tiny.tokenizer.decode(chat) == "<|user|>x<|end|><|assistant|>"


def test_curl_reads_a_stream(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True})
    words = [curl, "-sSN", "--fail", f"{server.url}/v1/completions", "-d", body]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == complete(server, max_tokens=5)["choices"][0]["text"]


def test_a_client_that_goes_away_frees_its_sequence(server: Server) -> None:
    free = server.metric("comboio_kv_blocks_free")
    gone = server.stderr.count("status=499")
    for streams in (True, False):
        body = json.dumps(
            {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": streams}
        ).encode()
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as link:
            head = f"POST {PLAIN} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n"
            link.sendall(head.encode() + body)
            if streams:
                assert link.recv(1000)
            until(lambda: server.metric("comboio_requests_running") == 1)
        until(lambda: server.metric("comboio_requests_running") == 0)
    assert server.metric("comboio_kv_blocks_free") == free
    until(lambda: server.stderr.count("status=499") == gone + 2)
    lines = [it for it in server.stderr.splitlines() if "status=499" in it][gone:]
    assert all(int(line.split(" tokens=")[1].split()[0]) < 3000 for line in lines)


def test_metrics_are_named_and_counted(server: Server) -> None:
    before = server.metric("comboio_generated_tokens_total")
    complete(server, max_tokens=7, ignore_eos=True)
    assert server.metric("comboio_generated_tokens_total") == before + 7
    assert server.metric("comboio_ready") == 1
    text = server.get("/metrics").body.decode()
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert all(name.startswith("comboio_") for name in names)
    assert "comboio_worker_compute_seconds_total" in names
    assert "comboio_time_to_first_token_seconds_bucket" in names
    for page in ("grafana.json", "serving.md"):
        told, _, _ = (ROOT / "docs" / page).read_text().partition("A worker shows its own")
        said = set(re.findall(r"comboio_[a-z_]*[a-z]", told))
        families = {name.removesuffix("_bucket") for name in names} | {"comboio_worker"}
        assert said - {"comboio_worker_"} <= names | families


def test_a_request_has_one_id_in_its_answer_its_headers_and_the_log(server: Server) -> None:
    got = server.post(PLAIN, {"prompt": PROMPT, "max_tokens": 1}, x_request_id="mine-1")
    assert got.headers["x-request-id"] == "mine-1" and got.json["id"] == "cmpl-mine-1"
    assert " id=mine-1 " in server.said("id=mine-1")
    odd = server.post(PLAIN, {"prompt": PROMPT, "max_tokens": 1}, x_request_id="a b/../c")
    assert len(odd.headers["x-request-id"]) == 24


async def test_the_live_view_shows_workers_and_what_is_generated(
    server: Server, workers: Workers
) -> None:
    reader, writer = await asyncio.open_connection(*server.url.removeprefix("http://").split(":"))
    writer.write(b"GET /live HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
    seen = []
    async with asyncio.timeout(60):
        while len(seen) < 3:
            line = await reader.readline()
            if line.startswith(b"data: "):
                seen.append(json.loads(line[6:]))
    writer.close()
    last = seen[-1]
    assert last["state"] == "ready" and last["tokens"] == server.metric(
        "comboio_generated_tokens_total"
    )
    assert [it["address"] for it in last["workers"]] == workers.addresses
    edges = [(it["start_layer"], it["end_layer"]) for it in last["workers"]]
    assert edges[0][0] == 0 and edges[0][1] == edges[1][0] and edges[1][1] == 4
