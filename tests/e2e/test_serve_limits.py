"""A server with narrow limits: queue, deadline, API key, adapters as models, draining."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.adapters import adapted, greedy
from tests.support.chains import Answer, TinyModel, Workers, manager
from tests.support.serving import Got, Server, until

KEY = "a-key-that-nobody-guesses"
PLAIN = "/v1/completions"
LONG = {"prompt": [5, 9], "max_tokens": 4000, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": [5, 9], "max_tokens": 2, "temperature": 0}


@dataclass(frozen=True)
class Narrow:
    """The server, and what its adapter is to generate."""

    server: Server
    adapted: Any
    traces: Path
    keys: Path

    def post(self, body: Any, key: str = KEY, **headers: str) -> Got:
        return self.server.post(PLAIN, body, authorization=f"Bearer {key}", **headers)

    def metric(self, name: str) -> float:
        text = self.server.get("/metrics", authorization=f"Bearer {KEY}").body.decode()
        return float(next(it.split()[-1] for it in text.splitlines() if it.startswith(name + " ")))


@pytest.fixture(scope="module")
def narrow(
    workers: Workers, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Narrow]:
    folder = tmp_path_factory.mktemp("narrow")
    model = adapted(tiny.model, folder / "verse")
    keys = folder / "keys"
    keys.write_text(f"{KEY}\nanother-key-of-somebody\n")
    keys.chmod(0o600)
    words = ["--workers", workers.option, "--host", "0.0.0.0", "--api-key-file", str(keys)]
    words += ["--max-concurrent", "1", "--max-queue", "1", "--drain-timeout", "120"]
    words += ["--max-body", "10kB", "--adapter", f"verse={folder / 'verse'}"]
    words += ["--cors-origin", "https://page.example", "--trace-dir", str(folder / "traces")]
    with Server(*words, "--log-format", "json") as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield Narrow(server, model, folder / "traces", keys)


class InThread(threading.Thread):
    """One request beside the others."""

    def __init__(self, narrow: Narrow, body: Any) -> None:
        super().__init__(daemon=True)
        self._narrow, self._body = narrow, body
        self.got: Got | None = None
        self.start()

    def run(self) -> None:
        self.got = self._narrow.post(self._body)

    @property
    def answer(self) -> Got:
        self.join(180)
        assert self.got is not None
        return self.got


def test_a_key_is_asked_for_where_somebody_elses_texts_could_be(narrow: Narrow) -> None:
    server = narrow.server
    for got in (narrow.post(SHORT, key="wrong"), server.post(PLAIN, SHORT), server.get("/metrics")):
        assert got.status == 401 and got.json["error"]["code"] == "invalid_api_key"
    assert server.get("/live").status == 401
    assert server.get("/health").status == 200 and server.get("/").status == 200
    assert narrow.post(SHORT, key="another-key-of-somebody").status == 200
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert KEY not in server.stderr


def test_an_adapter_is_a_model_of_its_own(narrow: Narrow, tiny: TinyModel) -> None:
    with openai.OpenAI(base_url=f"{narrow.server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [it.id for it in client.models.list()] == [narrow.server.model, "verse"]
        for model, source in (("verse", narrow.adapted), (narrow.server.model, tiny.model)):
            done = client.completions.create(
                model=model, prompt=[5, 9, 40, 7], max_tokens=8, temperature=0
            )
            expected = tiny.tokenizer.decode([5, 9, 40, 7, *greedy(source, [5, 9, 40, 7], 8)])
            assert expected.endswith(done.choices[0].text) and done.choices[0].text
            assert done.model == model


def test_who_finds_the_queue_full_is_told_when_to_come_back(narrow: Narrow) -> None:
    with openai.OpenAI(base_url=f"{narrow.server.url}/v1", api_key=KEY, max_retries=0) as client:
        with client.completions.create(
            model=narrow.server.model,
            prompt=[5, 9],
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as running:
            next(iter(running))
            waiting = InThread(narrow, SHORT)
            until(lambda: narrow.metric("comboio_requests_waiting") == 1)
            refused = narrow.post(SHORT)
            assert refused.status == 429 and refused.json["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert waiting.answer.status == 200


def test_a_request_that_takes_too_long_is_ended(workers: Workers) -> None:
    words = ("--workers", workers.option, "--max-concurrent", "1", "--request-timeout", "1")
    with Server(*words) as hasty:
        # Two texts one after the other: in a second no machine is through with them.
        late = hasty.post(PLAIN, {**LONG, "n": 2})
        streamed = hasty.post(PLAIN, {**LONG, "n": 2, "stream": True})
    assert late.status == 504 and "took longer than 1 s" in late.error
    last = streamed.body.decode().rstrip().split("\n\n")[-1]
    assert streamed.status == 200
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"


def test_a_request_that_is_too_large_is_refused(narrow: Narrow) -> None:
    got = narrow.post({"prompt": "x" * 20_000})
    assert got.status == 413 and "more than 10000 bytes" in got.error


def test_pages_from_a_named_origin_may_call(narrow: Narrow) -> None:
    got = narrow.post(SHORT, origin="https://page.example")
    assert got.headers["access-control-allow-origin"] == "https://page.example"
    assert narrow.post(SHORT, origin="https://other.example").status == 403


@pytest.mark.parametrize("source", ["environment", "file"])
def test_top_and_chat_find_the_key_where_other_settings_stand(
    narrow: Narrow, call: Callable[..., Answer], tmp_path: Path, source: str
) -> None:
    url = narrow.server.url
    keyless = call("top", "--once", "--server", url)
    assert keyless.returncode == 1 and "no API key" in keyless.stderr
    env = setting(source, narrow.keys, tmp_path)
    assert call("top", "--once", "--server", url, env=env).returncode == 0
    words = ("chat", "--server", url, "--max-new-tokens", "2", "--ignore-eos")
    told = manager(*words, stdin="the quick\n/quit\n", env=env)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_server_finds_the_key_there_too(
    call: Callable[..., Answer], tmp_path: Path, source: str
) -> None:
    env = setting(source, tmp_path / "nothing", tmp_path)
    answer = call("serve", "--host", "0.0.0.0", "--port", "0", env=env)
    assert answer.returncode == 2, answer.stderr
    assert f"cannot read the secret file {tmp_path / 'nothing'}" in answer.stderr


def setting(source: str, keys: Path, folder: Path) -> dict[str, str]:
    """The environment in which --api-key-file is set, itself or by a settings file."""
    if source == "environment":
        return {"COMBOIO_API_KEY_FILE": str(keys)}
    file = folder / "settings.toml"
    file.write_text(f'[manager]\napi-key-file = "{keys}"\n')
    return {"COMBOIO_CONFIG": str(file)}


def test_a_trace_is_written_of_every_request(narrow: Narrow) -> None:
    assert narrow.post(SHORT, x_request_id="traced").status == 200
    path = narrow.traces / "traced.json"
    until(lambda: path.exists() and path.read_text().endswith("]\n"))
    events = json.loads(path.read_text())
    assert {it["name"] for it in events if it["ph"] == "X" and it["cat"] == "request"} == {
        "until the first token",
        "tokens",
    }
    steps = [it for it in events if it.get("cat") == "step" and it["ph"] == "b"]
    computed = [it for it in events if it.get("cat") == "compute"]
    assert steps and len(computed) >= 2 * len(steps)


def test_a_signal_lets_what_runs_finish_and_takes_nothing_new(narrow: Narrow) -> None:
    running = InThread(narrow, {**LONG, "max_tokens": 2000})
    until(lambda: narrow.metric("comboio_requests_running") == 1)
    narrow.server.process.terminate()
    narrow.server.said('"draining"')
    health = narrow.server.get("/health")
    assert health.status == 503 and health.json["status"] == "draining"
    refused = narrow.post(SHORT)
    assert refused.status == 503 and "shutting down" in refused.error
    assert running.answer.status == 200
    assert running.answer.json["usage"]["completion_tokens"] == 2000
    assert narrow.server.process.wait(30) == 0


def test_events_of_a_stream_come_as_often_as_wanted(workers: Workers) -> None:
    body = {"prompt": [5, 9], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    texts = set()
    for most_a_second, fewest, most in (("0", 31, 61), ("1", 2, 30)):
        with Server("--workers", workers.option, "--stream-events", most_a_second) as server:
            events = server.post(PLAIN, body | {"stream": True}).events
            assert fewest <= len(events) <= most, most_a_second
            texts.add("".join(it["choices"][0]["text"] for it in events))
            texts.add(server.post(PLAIN, body).json["choices"][0]["text"])
    assert len(texts) == 1


# --- what is refused before anything starts ----------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--host", "0.0.0.0"), "pass --api-key-file FILE, or --insecure"),
        (("--port", "70000"), "--port 70000"),
        (("--max-concurrent", "0"), "--max-concurrent 0"),
        (("--max-body", "ten"), "--max-body: 'ten' is not a size"),
        (("--request-timeout", "0"), "--request-timeout 0"),
        (("--stream-events", "-1"), "--stream-events -1"),
        (("--api-key-file", "/nowhere"), "cannot read the secret file /nowhere"),
        (("--host", "no.such.host.invalid", "--insecure"), "this machine has no such address"),
        (("--adapter", "x=/a", "--adapter", "x=/b"), "would both be the model x"),
    ],
)
def test_a_bad_option_is_one_sentence(call: Any, words: tuple[str, ...], sentence: str) -> None:
    answer = call("serve", *words)
    assert (answer.returncode, sentence in answer.stderr) == (2, True), answer.stderr
    assert answer.stderr.count("\n") == 1


def test_a_key_file_that_others_read_is_refused(call: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    os.chmod(keys, 0o644)
    answer = call("serve", "--api-key-file", str(keys))
    assert answer.returncode == 2 and "chmod 600" in answer.stderr


def test_a_server_without_workers_says_so_and_ends(call: Any) -> None:
    answer = call("serve", "--port", "0", "--workers", "127.0.0.1:1")
    assert answer.returncode == 1 and "no worker answers at 127.0.0.1:1" in answer.stderr
