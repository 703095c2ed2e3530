"""`manager bench`: real workers measured through the command line, alone and against others."""

from __future__ import annotations

import json

import pytest

from tests.support.llama_servers import LlamaServer
from tests.support.tiny_gguf import write_tiny_gguf

SHORT = ("--rounds", "1", "--new-tokens", "4", "--prompt-tokens", "6")


def test_figures_for_every_number_of_streams_and_charts_of_them(call, workers, tmp_path):
    figures, charts = tmp_path / "figures.json", tmp_path / "charts"
    answer = call(
        *("bench", "--workers", workers.option, "--streams", "1,3", *SHORT),
        *("--json", str(figures), "--charts", str(charts), "--against", "transformers"),
    )
    assert answer.returncode == 0, answer.stderr
    said = json.loads(figures.read_text())
    assert [(it["streams"], it["contestant"]) for it in said["runs"]] == [
        *((1, "comboio"), (1, "transformers"), (3, "comboio"), (3, "transformers"))
    ]
    for run in said["runs"]:
        assert (run["prompt_tokens"], run["new_tokens"]) == (6, 4)
        assert run["tokens_per_s"] > 0
        assert run["first_token_s"]["p50"] <= run["first_token_s"]["p95"]
        assert len(run["busy"]) == (2 if run["contestant"] == "comboio" else 0)
    assert [it["address"] for it in said["workers"]] == workers.addresses
    assert "transformers" in answer.stdout and "busy" in answer.stdout
    names = {path.name for path in charts.iterdir()}
    assert names == {"tokens-per-second.png", "latency.png", "busy.png", "steps.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in charts.iterdir())


@pytest.mark.llama_cpp
def test_a_llama_server_that_is_up_is_measured_alone_and_against(call, workers, tmp_path):
    figures = tmp_path / "figures.json"
    options = ("bench", "--streams", "2", *SHORT, "--json", str(figures))
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    with LlamaServer(gguf, "-np", "2", "-c", "512") as server:
        alone = call(*options, "--server", server.url)
        assert alone.returncode == 0, alone.stderr
        (run,) = json.loads(figures.read_text())["runs"]
        assert (run["streams"], run["contestant"], run["new_tokens"]) == (2, server.url, 4)
        # It knows other tokens than the workers' model: prompts are of those that both know.
        both = call(*options, "--workers", workers.option, "--against", server.url)
        assert both.returncode == 0, both.stderr
    names = [run["contestant"] for run in json.loads(figures.read_text())["runs"]]
    assert names == ["comboio", server.url]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--streams", "0"), "--streams 0"),
        (("--streams", "many"), "--streams many"),
        (("--against", "vllm"), "--against vllm"),
        (("--against", "llama.cpp"), "--gguf"),
        (("--gguf", "model.gguf"), "--against llama.cpp"),
        (("--json", "/no/such/folder/f.json"), "/no/such/folder"),
        (("--trace", "t.json"), "--trace"),
        (("--server", "127.0.0.1:9", "--against", "transformers"), "--against URL"),
        (("--quantize", "int4", "--workers", "127.0.0.1:9"), "--quantize int4"),
        (
            ("--kv-quantize", "int8", "--workers", "127.0.0.1:9"),
            "--kv-quantize int8 is for workers",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(call, words, said):
    answer = call("bench", *words)
    assert answer.returncode == 2
    assert said in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_a_server_that_does_not_answer_is_named(call):
    answer = call("bench", "--server", "http://127.0.0.1:9")
    assert answer.returncode == 1
    assert answer.stderr.startswith("manager: no llama-server answers at http://127.0.0.1:9")


def test_a_request_that_ignores_end_tokens_generates_exactly_what_was_asked(call, workers):
    answer = call(
        *("generate", "fox", "--workers", workers.option, "--json"),
        *("--ignore-eos", "--max-new-tokens", "12"),
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["completion_tokens"] == 12
