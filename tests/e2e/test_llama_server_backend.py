"""`manager generate` and `manager batch` over a real llama-server that is up already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manager.generation import GenerationOptions
from manager.llama_server.client import LlamaClient
from manager.llama_server.remote import RemotePipeline
from tests.support.chains import manager, start_manager
from tests.support.llama_servers import LlamaServer, free_port
from tests.support.odd_ggufs import say_any_byte, slow_to_load_gguf
from tests.support.processes import ROOT, WorkerProcess
from tests.support.tiny_gguf import write_tiny_checkpoint, write_tiny_gguf

pytestmark = pytest.mark.llama_cpp

CONTEXT = 1024  # of each of the shared server's two slots
# Greedily, the model is sure of each of the first 30 tokens that it says to these: the two
# likeliest are far enough apart for two programs, and for any batch, to agree on them.
PROMPTS = ["the fox", "the and", "the an", "fox and", "and Zürich!"]
SURE_TOKENS = 30
SURE_CHARS = 30  # a token is a character at least


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", context=4096)


@pytest.fixture(scope="session")
def server(gguf: Path) -> Iterator[LlamaServer]:
    """A server that holds it. Leave it as it is."""
    with LlamaServer(gguf, "-c", str(2 * CONTEXT), "-np", "2", "--metrics") as running:
        yield running


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a worker that holds the same model."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), context=4096)
    with WorkerProcess("--model", str(folder), "--sections", "1", "--index", "0") as running:
        yield running.address


@pytest.fixture
def prompts(tmp_path):
    """Write a file of prompts: texts, or objects."""

    def write(rows):
        name = "p.txt" if isinstance(rows[0], str) else "p.jsonl"
        lines = rows if isinstance(rows[0], str) else map(json.dumps, rows)
        (tmp_path / name).write_text("".join(f"{it}\n" for it in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


def one_line(stderr: str) -> str:
    """The only line of an error."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("manager: ")
    return lines[0].removeprefix("manager: ")


def last_line(stderr: str) -> str:
    """What it says at its end, after lines on how it went."""
    line = stderr.splitlines()[-1]
    assert line.startswith("manager: "), stderr
    return line.removeprefix("manager: ")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the same as from workers --------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="plain"),
        pytest.param(["--repetition-penalty", "1.3"], id="penalty"),
        pytest.param(["--chat", "--system", "You are a poet."], id="chat"),
        pytest.param(["--stop", "3i", "--stop", "a."], id="stop"),
    ],
)
def test_generate_gives_the_object_that_the_pipeline_gives(call, server, worker, words):
    asked = ["generate", "the fox", "--json", "--max-new-tokens", "28", *words]
    here = json.loads(call(*asked, "--workers", worker).stdout)
    answer = call(*asked, "--server", server.url)
    assert answer.returncode == 0, answer.stderr
    there = json.loads(answer.stdout)
    assert list(there) == list(here)
    for name in ("text", "token_ids", "finish_reason", "prompt_tokens", "completion_tokens"):
        assert there[name] == here[name], name
    assert there["workers"] == []
    assert there["ttft_s"] > 0
    assert there["decode_tokens_per_s"] > 0


def test_batch_gives_the_results_that_the_pipeline_gives(call, server, worker, prompts, tmp_path):
    rows = [
        *({"prompt": prompt} for prompt in PROMPTS),
        {"id": "own", "prompt": "in", "max_new_tokens": 9, "repetition_penalty": 1.3},
        {"id": "stop", "prompt": "the fox", "stop": ["g", "3"]},
        {"id": "chat", "messages": [{"role": "user", "content": "the fox"}]},
        {"id": "empty", "prompt": ""},
    ]
    asked = ["batch", "--prompts", prompts(rows), "--max-new-tokens", str(SURE_TOKENS)]
    asked += ["--batch-size", "4"]
    call(*asked, "--workers", worker, "--output", str(tmp_path / "here.jsonl"))
    answer = call(*asked, "--server", server.url, "--output", str(tmp_path / "there.jsonl"))
    here, there = read(tmp_path / "here.jsonl"), read(tmp_path / "there.jsonl")
    assert answer.returncode == 1
    assert "1 of 9 rows failed" in last_line(answer.stderr)
    times = ("latency_s", "ttft_s", "decode_tokens_per_s")
    for ours, theirs in zip(here, there, strict=True):
        assert list(theirs) == list(ours)
        assert {**theirs, **dict.fromkeys(times)} == {**ours, **dict.fromkeys(times)}
        assert (theirs["ttft_s"] is None) == (ours["ttft_s"] is None)


def test_the_metrics_of_a_batch_are_the_pipelines_and_tell_of_the_server(
    call, server, worker, prompts, tmp_path
):
    asked = ["batch", "--prompts", prompts(PROMPTS), "--max-new-tokens", "12", "--iters", "2"]
    first, second = str(tmp_path / "here.jsonl"), str(tmp_path / "there.jsonl")
    here = json.loads(call(*asked, "--workers", worker, "--output", first, "--json").stdout)
    answer = call(*asked, "--server", server.url, "--output", second, "--json")
    assert answer.returncode == 0, answer.stderr
    there = json.loads(answer.stdout)
    assert set(there) == {*here, "server"}
    assert there["workers"] == []
    for name in ("completed", "failed", "prompt_tokens", "completion_tokens"):
        assert there[name] == here[name], name
    for name in ("latency_s", "ttft_s", "inter_token_s"):
        assert 0 < there[name]["p50"] <= there[name]["p95"] <= there[name]["max"]
    told = there["server"]
    assert told["url"] == server.url
    assert told["slots"] == 2
    assert told["context"] == CONTEXT
    assert told["file_type"] == "all F32"
    assert told["num_parameters"] > 100_000
    assert told["counters"]["generated_tokens"] == there["completion_tokens"]
    computed = told["counters"]["computed_prompt_tokens"] + told["cached_prompt_tokens"]
    assert computed == there["prompt_tokens"]
    assert "workers busy" not in answer.stderr
    assert f"{there['tokens_per_s']:.1f} tokens/s" in answer.stderr


def test_text_goes_to_stdout_and_what_it_took_to_stderr(server):
    answer = manager("generate", "the fox", "--server", server.url, "--max_new_tokens", "20")
    again = manager(
        *("generate", "-", "--backend", "llama-server", "--server", f"{server.url}/v1/"),
        *("--max-new-tokens", "20", "--json"),
        stdin="the fox\n",
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == json.loads(again.stdout)["text"] + "\n"
    assert answer.stderr.startswith("20 tokens, ")
    assert answer.stderr.endswith(f"; tiny.gguf at {server.url}\n")


def test_a_reader_gets_the_text_as_it_comes(server):
    running = start_manager("generate", "the", "--server", server.url, "--max-new-tokens", "1000")
    assert running.stdout is not None
    assert running.stdout.read(1)  # the first character is there
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode in (130, 0)  # it may just have been done
    assert b"Traceback" not in stderr


def test_seeds_are_heard_whole(call, server):
    words = ["generate", "the", "--server", server.url, "--json", "--temperature", "1.5"]

    def drawn(*more: str) -> list[int]:
        return json.loads(call(*words, "--max-new-tokens", "20", *more).stdout)["token_ids"]

    drawn()  # from now on, the server has the prompt, and computes the same every time
    assert drawn("--seed", "3") == drawn("--seed", "3")
    assert drawn("--seed", "3") != drawn("--seed", "4")
    assert drawn("--seed", str(2**62 + 1)) == drawn("--seed", str(2**62 + 1))
    # llama-server draws at random with this one.
    assert drawn("--seed", str(2**32 - 1)) == drawn("--seed", str(2**32 - 1))
    assert drawn() != drawn()


def test_a_full_context_ends_the_text_and_is_said(call, server):
    answer = call("generate", "the fox", "--server", server.url, "--max-new-tokens", "5000")
    assert answer.returncode == 0
    assert f"the server's context of {CONTEXT} tokens is full" in answer.stderr


def test_neither_torch_nor_transformers_is_loaded(server, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    answer = manager(
        *("generate", "the fox", "--server", server.url, "--max-new-tokens", "3"),
        env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert answer.returncode == 0, answer.stderr


# --- characters of several tokens, and the end token ---------------------------------------------


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """A server whose model says any byte, and ends its texts."""
    path = write_tiny_gguf(tmp_path_factory.mktemp("wild") / "wild.gguf", context=4096)
    say_any_byte(path)
    with LlamaServer(path, "-c", "2048", "-np", "4") as running:
        yield running


async def test_every_token_is_counted_also_those_that_end_inside_a_character(wild):
    async with await RemotePipeline.open(wild.url) as pipeline:
        for seed in range(20):
            pieces = []
            completion = await pipeline.generate(
                "the",
                GenerationOptions(max_new_tokens=40, temperature=1.5, seed=seed),
                on_piece=pieces.append,
            )
            assert completion.text == "".join(piece.text for piece in pieces)
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
            assert pieces[-1].finish_reason == completion.finish_reason
            assert len(completion.token_times_s) == completion.completion_tokens
            if completion.finish_reason == "length":
                assert completion.completion_tokens == 40
            elif "\ufffd" not in completion.text:
                assert completion.token_ids[-1] == 0  # the end token, as in the pipeline
            if "\ufffd" not in completion.text:
                assert len(completion.token_ids) == completion.completion_tokens


async def test_the_ids_of_a_character_of_several_tokens_are_found(wild):
    async with LlamaClient(wild.url) as client:
        for seed in range(200):
            options = GenerationOptions(max_new_tokens=12, temperature=1.5, seed=seed)
            completion = await client.complete("the", options)
            if not completion.text.isascii() and "\ufffd" not in completion.text:
                break
        else:
            raise AssertionError("the model never said a whole character of several tokens")
        assert len(completion.token_ids) == completion.completion_tokens


# --- what can go wrong ---------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_its_rows_error(call, server, prompts):
    rows = ["the fox", "the " * 2 * CONTEXT, "and"]
    answer = call("batch", "--prompts", prompts(rows), "--server", server.url)
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert answer.returncode == 1
    assert [it["finish_reason"] for it in results] == ["length", "error", "length"]
    assert f"the server's context of {CONTEXT} leaves room for" in results[1]["error"]
    assert results[1]["prompt_tokens"] is None
    assert "1 of 3 rows failed" in last_line(answer.stderr)


def test_nobody_there_is_one_sentence(call):
    url = f"http://127.0.0.1:{free_port()}"
    answer = call("generate", "fox", "--server", url)
    assert answer.returncode == 1
    assert one_line(answer.stderr) == (
        f"no llama-server answers at {url} (connection refused): start one with "
        "`llama-server -m MODEL.gguf --host HOST --port PORT`, or check --server"
    )


def test_something_else_there_is_one_sentence(call, worker, tmp_path):
    page = subprocess.Popen(
        ["python3", "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert page.stdout is not None
        port = page.stdout.readline().split(b" port ")[1].split()[0].decode()
        web_page = call("generate", "fox", "--server", f"127.0.0.1:{port}")
    finally:
        page.kill()
        page.communicate()
    assert web_page.returncode == 2
    assert one_line(web_page.stderr) == (
        f"what answers at http://127.0.0.1:{port} is no llama-server (GET /health gave 404): "
        "check --server."
    )
    own_worker = call("generate", "fox", "--server", worker)
    assert own_worker.returncode == 1
    assert f"no llama-server answers at http://{worker} (" in one_line(own_worker.stderr)


def test_a_server_that_loads_is_waited_for(call, tmp_path):
    with LlamaServer(slow_to_load_gguf(tmp_path / "slow.gguf"), "-c", "256", wait=False) as slow:
        slow.wait_for_health(503)
        answer = call("generate", "the fox", "--server", slow.url)
        assert answer.returncode == 0, answer.stderr
        assert answer.stderr.splitlines()[0] == (
            f"the llama-server at {slow.url} is loading its model"
        )


def test_a_server_that_dies_while_it_loads_is_one_sentence(tmp_path):
    with LlamaServer(slow_to_load_gguf(tmp_path / "slow.gguf"), "-c", "256", wait=False) as slow:
        slow.wait_for_health(503)
        running = start_manager("generate", "the fox", "--server", slow.url)
        assert running.stderr is not None
        assert b"is loading its model" in running.stderr.readline()
        slow.kill()
        stderr = running.communicate(timeout=120)[1].decode()
    assert running.returncode == 1
    assert f"no llama-server answers at {slow.url}" in one_line(stderr)


@pytest.fixture(scope="module")
def locked(gguf, tmp_path_factory):
    """A server that asks for an API key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("first-key\nsecond-key\n")
    with LlamaServer(gguf, "-c", "512", "-np", "1", "--api-key-file", str(file)) as running:
        yield running


def test_the_api_key_comes_from_a_file_or_the_environment(call, locked, tmp_path):
    key = tmp_path / "key"
    key.write_text("first-key\n")
    key.chmod(0o600)
    asked = ["generate", "the fox", "--server", locked.url, "--max-new-tokens", "3"]
    openai = {"OPENAI_BASE_URL": f"{locked.url}/v1", "OPENAI_API_KEY": "second-key"}
    elsewhere = {**openai, "OPENAI_BASE_URL": "https://api.example.com/v1"}
    assert call(*asked, "--api-key-file", str(key)).returncode == 0
    assert call(*asked, env={"COMBOIO_API_KEY_FILE": str(key)}).returncode == 0
    assert call(*asked, env={"LLAMA_API_KEY": "second-key"}).returncode == 0
    assert call(*asked, env=openai).returncode == 0
    # The key of another service is not shown to this server.
    assert call(*asked, env=elsewhere).returncode == 2


def test_a_missing_and_a_wrong_api_key_are_one_sentence_each(call, locked, tmp_path):
    asked = ["generate", "the fox", "--server", locked.url]
    without = call(*asked)
    assert without.returncode == 2
    assert one_line(without.stderr) == (
        f"the llama-server at {locked.url} asks for an API key: pass --api-key-file FILE."
    )
    key = tmp_path / "key"
    key.write_text("third-key\n")
    key.chmod(0o600)
    wrong = call(*asked, "--api-key-file", str(key))
    assert wrong.returncode == 2
    assert "does not take this API key: check --api-key-file" in one_line(wrong.stderr)
    assert "third-key" not in wrong.stderr
    key.chmod(0o644)
    shown = call(*asked, "--api-key-file", str(key))
    assert shown.returncode == 2
    assert one_line(shown.stderr) == (
        f"--api-key-file {key} can be read or written by others (mode 0644): run `chmod 600 {key}`."
    )


def test_another_model_than_the_one_named_is_one_sentence(call, server):
    asked = ["generate", "the fox", "--server", server.url, "--max-new-tokens", "3"]
    assert call(*asked, "--model", "tiny.gguf").returncode == 0
    other = call(*asked, "--model", "large.gguf")
    assert other.returncode == 2
    assert f"at {server.url} holds tiny.gguf, not large.gguf" in one_line(other.stderr)


# --- lost on the way -----------------------------------------------------------------------------


def test_a_server_that_dies_on_the_way_leaves_the_text_so_far(gguf):
    with LlamaServer(gguf, "-c", "4096", "-np", "1") as dying:
        running = start_manager(
            "generate", "the", "--server", dying.url, "--max-new-tokens", "4000", "--stop", "@"
        )
        assert running.stdout is not None
        begun = running.stdout.read(1)
        dying.kill()
        stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 1
    assert begun + stdout
    assert f"the llama-server at {dying.url} was lost: " in one_line(stderr.decode())


@contextmanager
def running_batch(*words):
    """The command in the background; ended with the block."""
    process = start_manager("batch", *words)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=120)


def wait_for_rows(partial: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Until so many rows are in the partial file: it is followed as `tail -f` would."""
    while not partial.exists() or partial.read_bytes().count(b"\n") < 1 + count:
        assert process.poll() is None, process.communicate()[1].decode()
        threading.Event().wait(0.005)


def test_a_batch_goes_on_where_it_ended_when_the_server_is_back(
    call, gguf, server, worker, prompts, tmp_path
):
    texts = [f"{prompt} {number}" for number in range(29) for prompt in PROMPTS[:2]]
    texts += PROMPTS[:2]
    output, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    asked = [
        *("--prompts", prompts(texts), "--max-new-tokens", "150", "--batch-size", "4"),
        *("--output", str(output)),
    ]
    with LlamaServer(gguf, "-c", "1024", "-np", "1") as dying:
        with running_batch(*asked, "--server", dying.url) as process:
            wait_for_rows(partial, 3, process)
            dying.kill()
            stderr = process.communicate(timeout=120)[1].decode()
    kept = read(partial)[1:]
    assert process.returncode == 1
    assert 3 <= len(kept) < 60
    said = last_line(stderr)
    assert said.startswith(f"the llama-server at {dying.url} was lost: ")
    assert said.endswith(
        f"; {len(kept)} of 60 rows are kept in {partial}: run the same command again to go on"
    )
    other = call("batch", *asked, "--workers", worker)
    assert other.returncode == 2
    assert 'was begun with model "tiny.gguf", now it is ' in one_line(other.stderr)
    # The same model on another server, with another context: it is the same batch.
    again = call("batch", *asked, "--server", server.url)
    assert again.returncode == 0, again.stderr
    assert f"going on: {len(kept)} of 60 rows are done already" in again.stderr
    results = read(output)
    assert [it["prompt"] for it in results] == texts
    for line in kept:  # not one of them ran twice
        assert results[line["result"]["index"]] == line["result"]
    single = call(
        "generate", texts[-1], "--server", server.url, "--json", "--max-new-tokens", "150"
    )
    whole = json.loads(single.stdout)["text"]
    assert results[-1]["text"][:SURE_CHARS] == whole[:SURE_CHARS]


def test_an_interrupted_batch_says_what_is_kept(server, prompts, tmp_path):
    output, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    with running_batch(
        *("--prompts", prompts(["the"] * 80), "--max-new-tokens", "800"),
        *("--server", server.url, "--output", str(output)),
    ) as process:
        wait_for_rows(partial, 2, process)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130
    num_kept = len(read(partial)) - 1
    assert last_line(stderr) == (
        f"interrupted: {num_kept} of 80 rows are kept in {partial}: "
        "run the same command again to go on"
    )


async def test_a_server_that_says_nothing_any_more_is_lost(gguf):
    with LlamaServer(gguf, "-c", "512", "-np", "1") as silent:
        async with LlamaClient(silent.url, timeout_s=0.5) as client:
            assert (await client.complete("the")).error is None
            silent.pause()
            completion = await client.complete("the")
            assert completion.finish_reason == "error"
            assert completion.error == (
                f"the llama-server at {silent.url} was lost: it has said nothing for 0.5 s"
            )
            assert str(client.lost) == completion.error


def test_rows_that_do_not_fit_together_run_one_after_the_other(call, gguf, prompts):
    """Four slots that share a context of 512: all fail when it is full, and each fits alone."""
    asked = ["batch", "--prompts", prompts(PROMPTS[:4]), "--max-new-tokens", "300"]
    with LlamaServer(gguf, "-c", "512", "-np", "4", "--kv-unified") as narrow:
        answer = call(*asked, "--server", narrow.url)
        assert answer.returncode == 0, answer.stderr
        results = [json.loads(line) for line in answer.stdout.splitlines()]
        assert [it["completion_tokens"] for it in results] == [300] * 4
        assert "too small for all that ran at once" in answer.stderr
        alone = call(*asked, "--server", narrow.url, "--batch-size", "1")
    for line, result in zip(alone.stdout.splitlines(), results, strict=True):
        assert json.loads(line)["text"][:SURE_CHARS] == result["text"][:SURE_CHARS]


# --- options that go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--backend", "llama-server"], "needs a server that is up: pass --server"),
        (["--server", "h:1", "--workers", "h:2"], "--workers means nothing to a llama-server"),
        (["--server", "h:1", "--spawn", "2"], "--spawn means nothing to a llama-server"),
        (["--server", "h:1", "--trace", "t"], "--trace means nothing to a llama-server"),
        (["--server", "h:1", "--secret-file", "s"], "--secret-file means nothing to a llama-serv"),
        (["--server", "h:1", "--backend", "pipeline"], "--server means nothing to a pipeline"),
        (["--api-key-file", "k"], "--api-key-file is for a llama-server: pass --server URL"),
        (["--server", "ftp://h:1"], "it is reached by http or https, not by ftp"),
        (["--server", "h"], "it names no port"),
        (["--server", "http://me:secret@h:1"], "--server has a user or a password in it"),
    ],
)
def test_options_that_mean_nothing_together_are_refused(call, words, sentence):
    answer = call("generate", "fox", *words)
    assert answer.returncode == 2
    assert sentence in one_line(answer.stderr)
    assert "secret@" not in answer.stderr


def test_a_prompt_that_is_no_utf8_is_one_sentence(call):
    answer = call("generate", "the \udcff", "--server", "127.0.0.1:1")
    assert answer.returncode == 2
    assert "the prompt has a byte that is no UTF-8 behind 'the '" in one_line(answer.stderr)


def test_settings_of_the_other_backend_are_no_conflict(call, server, worker, tmp_path):
    settings = tmp_path / "comboio.toml"
    settings.write_text(
        f'[manager]\nworkers = "{worker}"\nmodel = "nowhere"\nsecret_file = "nowhere"\n'
        'base-model = "nowhere"\n'
    )
    env = {"COMBOIO_CONFIG": str(settings)}
    asked = ["generate", "the fox", "--max-new-tokens", "3"]
    assert call(*asked, "--server", server.url, env=env).returncode == 0
    rows = tmp_path / "p.txt"
    rows.write_text("the fox\n")
    batch = ["batch", "--prompts", str(rows), "--max-new-tokens", "3"]
    assert call(*batch, "--server", server.url, env=env).returncode == 0
    settings.write_text(f'[manager]\nbackend = "llama-server"\nserver = "{server.url}"\n')
    assert "tiny.gguf at" in call(*asked, env=env).stderr
    assert "layers 0:4 at" in call(*asked, "--workers", worker, env=env).stderr


def test_a_proxy_of_the_cluster_is_not_asked_for_a_node(server):
    nobody = f"http://127.0.0.1:{free_port()}"
    answer = manager(
        *("generate", "the fox", "--server", server.url, "--max-new-tokens", "3"),
        env={"HTTP_PROXY": nobody, "http_proxy": nobody, "NO_PROXY": "", "no_proxy": ""},
    )
    assert answer.returncode == 0, answer.stderr
