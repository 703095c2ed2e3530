"""`manager llama-server run` with the real binaries: what it answers, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.request
from pathlib import Path

import pytest

from tests.support.llama_run import LlamaRun, llama_run
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.llama_cpp

# Slow enough to be killed in the middle of an answer, quick enough for a test.
LONG_LAYERS = 16
LONG_TOKENS = 600


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def long_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "long.gguf"
    return write_tiny_gguf(path, num_layers=LONG_LAYERS, context=4096)


def prompt_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "user_prompt.txt").write_text("hello there\n")
    (folder / "system_prompt").write_text("be brief\n")
    return folder


def config_file(folder: Path, **keys: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return path


def test_the_keys_of_before_give_an_answer_with_its_timings_beside_it(gguf, tmp_path):
    prompt_folder(tmp_path / "prompts")
    config = config_file(
        tmp_path,
        job_name="demo",
        output_log="llama-%j.log",
        result_file="result.txt",
        model=str(gguf),
        venv_dir="",
        prompt_dir="prompts",
        nodes=3,
        ntasks=3,
        time="00:30:00",
        sbatch_script="job.sbatch",
    )
    done = llama_run("--config", str(config), "--max-new-tokens", "24")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "result.txt").read_text()
    assert len(text.strip("\n")) >= 24
    assert done.stdout == text
    timings = json.loads((tmp_path / "result.txt.timings.json").read_text())
    assert timings["completion_tokens"] == 24
    assert timings["finish_reason"] == "length"
    assert len(timings["rpc_servers"]) == 2
    assert timings["restarts"] == 0
    log = (tmp_path / "llama-here.log").read_text()
    assert "rpc-server 2: Accepted client connection" in log
    assert "llama-server: " in log and "model loaded" in log


def test_the_answer_is_the_same_over_none_one_and_two_rpc_servers(gguf):
    words = ("--model", str(gguf), "--prompt", "the fox and", "--max-new-tokens", "32", "--json")
    answers = [llama_run(*words, "--nodes", str(nodes)) for nodes in (1, 2, 3)]
    assert [answer.returncode for answer in answers] == [0, 0, 0], answers
    printed = [json.loads(answer.stdout) for answer in answers]
    assert len({it["text"] for it in printed}) == 1
    assert [len(it["rpc_servers"]) for it in printed] == [0, 1, 2]


def test_a_result_file_in_json_has_text_and_timings_together(gguf, tmp_path):
    result = tmp_path / "result.json"
    words = ("--model", str(gguf), "--prompt", "hi", "--result-file", str(result))
    done = llama_run(*words, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    assert written["text"] == done.stdout.removesuffix("\n")
    assert written["completion_tokens"] == 8
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_file_of_prompts_gives_a_line_each_in_their_order(gguf, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "prompt": "the fox"}, {"id": "b", "prompt": "a dog", "max_new_tokens": 3}]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output, metrics = tmp_path / "out.jsonl", tmp_path / "metrics.json"
    words = ("--prompts", str(prompts), "--output", str(output), "--metrics", str(metrics))
    done = llama_run("--model", str(gguf), *words, "--max-new-tokens", "6", "--nodes", "2")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in results] == ["a", "b"]
    assert [row["completion_tokens"] for row in results] == [6, 3]
    assert json.loads(metrics.read_text())["rows"] == 2


def test_a_kept_server_says_where_it_is_and_ends_with_all_its_processes(gguf):
    with LlamaRun("--model", str(gguf), "--nodes", "3", "--keep") as running:
        running.wait_for_stderr("is up until ctrl-C")
        url = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+)\n", running.stdout)[1]
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            assert json.load(answer) == {"status": "ok"}
        assert len(running.children("rpc-server")) == 2
        assert len(running.children("llama-server")) == 1
        running.send(signal.SIGTERM)
        assert running.wait().returncode == 0


def test_a_killed_command_takes_its_processes_with_it(gguf):
    with LlamaRun("--model", str(gguf), "--nodes", "2", "--keep") as running:
        running.wait_for_stdout("ready")
        children = running.children()
        running.send(signal.SIGKILL)
        running.process.wait(20)
        for child in children:
            child.wait(20)


def test_a_port_that_is_taken_is_one_sentence(gguf):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ("--model", str(gguf), "--prompt", "hi", "--nodes", "2")
        server = llama_run(*words, "--port-server", port)
        rpc = llama_run(*words, "--port-rpc", port)
    assert (server.returncode, rpc.returncode) == (2, 2)
    assert server.stderr.count("\n") == rpc.stderr.count("\n") == 1
    assert f"port {port} of 127.0.0.1 cannot be used" in server.stderr
    assert "set port_server to another one" in server.stderr
    assert "set port_rpc to another one" in rpc.stderr


def test_a_lost_rpc_server_is_restarted_and_the_answer_is_whole(long_gguf, tmp_path):
    result = tmp_path / "result.txt"
    words = ("--model", str(long_gguf), "--prompt", "hi", "--max-new-tokens", str(LONG_TOKENS))
    undisturbed = llama_run(*words, "--nodes", "3")
    with LlamaRun(*words, "--nodes", "3", "--result-file", str(result)) as running:
        running.wait_for(lambda: len(running.stdout) > 20, "text")
        running.kill_rpc_server(1)
        done = running.wait()
    assert done.returncode == 0, done.stderr
    assert "rpc-server 2 at 127.0.0.1:" in done.stderr
    assert done.stderr.count("starting everything once more") == 1
    assert done.stdout == result.read_text() == undisturbed.stdout
    timings = json.loads((tmp_path / "result.txt.timings.json").read_text())
    assert (timings["restarts"], timings["completion_tokens"]) == (1, LONG_TOKENS)


def test_prompts_that_were_answered_before_a_loss_are_not_asked_again(long_gguf, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("".join(f"prompt {index}\n" for index in range(6)))
    partial = tmp_path / "out.jsonl.partial"

    def num_done() -> int:
        return max(0, partial.read_bytes().count(b"\n") - 1) if partial.exists() else 0

    words = ("--prompts", str(prompts), "--output", str(output), "--parallel", "1", "--nodes", "2")
    with LlamaRun("--model", str(long_gguf), *words, "--max-new-tokens", "150") as running:
        running.wait_for(lambda: num_done() >= 2, "two answers")
        running.kill_rpc_server()
        done = running.wait()
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on: [2-5] of 6 rows are done already", done.stderr)
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in results] == [f"prompt {index}" for index in range(6)]
    assert {row["completion_tokens"] for row in results} == {150}
    assert not partial.exists()


def test_a_second_loss_ends_the_run_in_one_sentence(long_gguf):
    words = ("--model", str(long_gguf), "--prompt", "hi", "--max-new-tokens", str(LONG_TOKENS))
    with LlamaRun(*words, "--nodes", "2") as running:
        running.wait_for(lambda: len(running.stdout) > 20, "text")
        running.kill_rpc_server()
        running.wait_for_stderr("ready after", times=2)
        running.kill_rpc_server()
        done = running.wait()
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("manager: rpc-server 1 at 127.0.0.1:")
    assert "was ended by SIGKILL" in last and "it happened twice" in last
    assert "the last it said: " in last


def test_an_rpc_server_that_hangs_is_given_up_in_one_sentence(long_gguf):
    words = ("--model", str(long_gguf), "--prompt", "hi", "--max-new-tokens", str(LONG_TOKENS))
    with LlamaRun(*words, "--nodes", "2", "--request-timeout-s", "1") as running:
        running.wait_for(lambda: len(running.stdout) > 20, "text")
        running.children("rpc-server")[0].send_signal(signal.SIGSTOP)
        done = running.wait()
    assert done.returncode == 1
    assert "was lost: it has said nothing for 1 s" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_model_loads_ends_everything(gguf, tmp_path, number, code):
    # llama-server opens its model, and then waits for whoever writes the adapter.
    adapter = tmp_path / "adapter.gguf"
    os.mkfifo(adapter)
    words = ("--model", str(gguf), "--prompt", "hi", "--nodes", "2")
    log = tmp_path / "log.txt"
    stuck = ("--server-args", f"--lora {adapter}", "--output-log", str(log))
    with LlamaRun(*words, *stuck) as running:
        running.wait_for(lambda: log.exists() and "loading model" in log.read_text(), "loading")
        running.send(number)
        done = running.wait()
    assert done.returncode == code
    assert done.stderr.endswith("manager: interrupted\n")


def test_a_model_that_does_not_load_in_time_is_one_sentence(gguf, tmp_path):
    adapter = tmp_path / "adapter.gguf"
    os.mkfifo(adapter)
    words = ("--model", str(gguf), "--prompt", "hi", "--server-args", f"--lora {adapter}")
    done = llama_run(*words, "--load-timeout-s", "1")
    assert done.returncode == 1
    assert "llama-server was not ready within 1 seconds: raise load_timeout_s" in done.stderr


def test_what_llama_server_refuses_is_one_sentence(gguf):
    words = ("--model", str(gguf), "--prompt", "hi")
    unknown = llama_run(*words, "--server-args", "--no-such-flag")
    assert unknown.returncode == 1
    assert "it does not know this word of server_args (--no-such-flag)" in unknown.stderr
    reserved = llama_run(*words, "--server-args", "--port 8080")
    assert reserved.returncode == 2
    assert "server_args has --port: port_server sets it; take it out." in reserved.stderr
    reserved = llama_run(*words, "--nodes", "2", "--rpc-args", "-H 0.0.0.0")
    assert reserved.returncode == 2
    assert "rpc_args has -H: it listens where its llama-server reaches it" in reserved.stderr
    uneven = llama_run(*words, "--nodes", "4", "--tensor-split", "3,1")
    assert uneven.returncode == 2
    assert "tensor_split has 2 shares and there are 3 rpc-servers" in uneven.stderr


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(gguf):
    words = ("--model", str(gguf), "--prompt", "hi", "--context", "2000000000")
    done = llama_run(*words)
    assert done.returncode == 2
    assert re.search(r"needs about \d+\.\d GB of memory .* are free on this machine", done.stderr)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "nothing to do: pass --prompt TEXT, --prompts FILE or --prompt-dir DIR to ask, or"),
        (("--prompt", " "), "prompt is empty: write at least one character."),
        (("--prompt", "hi", "--prompts", "a.txt"), "prompt and prompts both say what to ask"),
        (("--prompt", "hi", "--result-file", "no/a.txt"), "make it first"),
        (("--prompt-dir", "no-such"), "does not exist: name the folder that has user_prompt.txt"),
        (("--keep", "--json"), "--json prints an answer, and nothing is asked"),
        (("--prompt", "hi", "--metrics", "tiny.gguf"), "model and metrics are the same file"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_before_anything_starts(gguf, words, sentence):
    done = llama_run("--model", str(gguf), *words, cwd=gguf.parent)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_server_with_an_api_key_is_asked_with_it(gguf, tmp_path):
    key = tmp_path / "key"
    key.write_text("secret-1\n")
    key.chmod(0o600)
    words = ("--model", str(gguf), "--prompt", "hi", "--api-key-file", str(key))
    done = llama_run(*words, "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) >= 4
