"""A checkpoint from anybody, given to the commands that people type: one sentence, and exit 2."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import run_worker
from tests.support.serving import Server

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def one_line(text: str) -> str:
    lines = [it for it in text.splitlines() if it.startswith("manager: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """The model that the workers hold, to be spoilt at the manager's side."""
    return shutil.copytree(tiny.folder, tmp_path / "model")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOP, "takes more than 5 seconds of a core"),
        ("{{ 'a' * 10**11 }}", "bytes of memory"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('one\n\x1b[2Jtwo') }}", "conversation: one"),
        ("{%", "tag name expected"),
    ],
)
def test_a_hostile_chat_template_ends_in_one_sentence(template, said, call, workers, model):
    (model / "chat_template.jinja").write_text(template)
    answer = call("generate", "fox", "--chat", "--workers", workers.option, "--model", str(model))
    assert answer.returncode == 2
    assert answer.stdout == ""
    refused = one_line(answer.stderr)
    assert said in refused and refused.isprintable()


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}}),
        ("tokenizer.json", {"model": {"type": "Evil"}}),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    ],
    ids=str,
)
def test_a_hostile_tokenizer_ends_in_one_sentence(file, values, call, workers, model):
    change(model / file, **values)
    answer = call("generate", "fox", "--workers", workers.option, "--model", str(model))
    assert answer.returncode == 2
    assert "tokenizer" in one_line(answer.stderr)


def test_tokens_that_the_model_does_not_have_are_refused(call, workers, model):
    text = (model / "tokenizer.json").read_text()
    said = json.loads(text)
    said["added_tokens"].append(
        {
            "id": 5000, "content": "fox", "special": False, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False,
        }
    )  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(said))
    answer = call("generate", "the fox", "--workers", workers.option, "--model", str(model))
    assert answer.returncode == 2
    assert "token" in one_line(answer.stderr)


def test_a_worker_that_is_given_a_hostile_checkpoint_says_so_in_one_sentence(model):
    change(model / "config.json", num_hidden_layers=10**9)
    where = ("--sections", "1", "--index", "0", "--listen", "127.0.0.1:0")
    done = run_worker("--model", str(model), *where)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [it for it in done.stderr.splitlines() if it.startswith("worker: ")]
    assert "'num_hidden_layers' 1000000000" in line
    assert "Traceback" not in done.stderr


def test_a_server_goes_on_while_a_template_takes_its_time(workers, model):
    (model / "chat_template.jinja").write_text(
        "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    )
    asked: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    with Server("--workers", workers.option, "--model", str(model)) as server:
        refused: list[Any] = []

        def chat(text: str) -> Any:
            messages = [{"role": "user", "content": text}]
            return server.post("/v1/chat/completions", {**asked, "messages": messages})

        looping = threading.Thread(target=lambda: refused.append(chat("loop")))
        looping.start()
        while looping.is_alive():
            done = server.post("/v1/completions", {**asked, "prompt": "the quick"})
            assert done.status == 200
        looping.join()
        assert refused[0].status == 400
        assert "takes more than 5 seconds of a core" in refused[0].error
        assert chat("fox").status == 200


def test_who_asks_brings_no_template(server):
    messages = [{"role": "user", "content": "fox"}]
    for kwargs in ({"chat_template": "{{ 1 }}"}, {"chat_template": LOOP}):
        refused = server.post(
            "/v1/chat/completions", {"messages": messages, "chat_template_kwargs": kwargs}
        )
        assert refused.status == 400
        assert "chat_template_kwargs has a chat_template" in refused.error
