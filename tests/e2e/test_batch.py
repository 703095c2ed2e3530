"""`manager batch` as people type it, over real workers."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.chains import ROOT, clean_environment, manager, sections_of, start_manager
from tests.support.traces import read_trace

RESULT_KEYS = [
    "index",
    "id",
    "prompt",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "latency_s",
    "ttft_s",
    "decode_tokens_per_s",
    "error",
]
PROMPTS = ["the quick", "fox", "a lazy dog.", "Olá, Zürich!", "jumps over the brown dog"]


def one_line(stderr):
    """The only line of an error that came before anything ran."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("manager: ")
    return lines[0]


def last_line(stderr):
    """What it says at its end, after lines on how it went."""
    line = stderr.splitlines()[-1]
    assert line.startswith("manager: "), stderr
    return line


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(tmp_path):
    """Write a file of prompts: texts, or objects."""

    def write(rows, name=None):
        name = name or ("p.txt" if isinstance(rows[0], str) else "p.jsonl")
        lines = rows if isinstance(rows[0], str) else map(json.dumps, rows)
        (tmp_path / name).write_text("".join(f"{it}\n" for it in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def expected(tiny):
    """What transformers itself says to a prompt, greedily, one at a time."""

    def say(prompt, num_tokens):
        ids = tiny.greedy(tiny.tokenizer(prompt)["input_ids"], num_tokens)
        return tiny.tokenizer.decode(ids, skip_special_tokens=True)

    return say


# --- results and metrics -------------------------------------------------------------------------


def test_the_guide_s_flags_give_results_in_input_order_and_metrics(
    workers, tiny, prompts, expected, tmp_path
):
    answer = manager(
        "batch",
        *("--base_model", str(tiny.folder), "--prompts", prompts(PROMPTS)),
        *("--batch_size", "3", "--max_new_tokens", "12", "--iters", "2"),
        *("--workers", workers.option, "--output", str(tmp_path / "o.jsonl")),
        *("--metrics", str(tmp_path / "m.json"), "--json"),
    )
    assert answer.returncode == 0, answer.stderr
    results = read(tmp_path / "o.jsonl")
    assert [list(it) for it in results] == [RESULT_KEYS] * len(PROMPTS)
    assert [it["prompt"] for it in results] == PROMPTS
    assert [it["text"] for it in results] == [expected(prompt, 12) for prompt in PROMPTS]
    assert {it["error"] for it in results} == {None}
    assert all(0 < it["ttft_s"] <= it["latency_s"] for it in results)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert json.loads(answer.stdout) == metrics
    assert metrics["rows"] == len(PROMPTS)
    assert metrics["completed"] == 2 * len(PROMPTS)  # of both iterations
    completed_tokens = sum(it["completion_tokens"] for it in results)
    assert metrics["completion_tokens"] == 2 * completed_tokens
    assert metrics["tokens_per_s"] == pytest.approx(2 * completed_tokens / metrics["wall_s"])
    for name in ("latency_s", "ttft_s", "inter_token_s"):
        assert 0 < metrics[name]["p50"] <= metrics[name]["p95"] <= metrics[name]["max"]
    assert [it["address"] for it in metrics["workers"]] == workers.addresses
    for worker in metrics["workers"]:
        assert 0 < worker["busy_share"] <= 1
        assert worker["rss_bytes"] > 0
        assert worker["sent_bytes"] > 0
        assert worker["checkpoint_read_bytes"] == worker["stage_bytes"]
    assert metrics["manager"]["cpu_percent"] > 0
    assert f"{metrics['tokens_per_s']:.1f} tokens/s" in answer.stderr


def test_without_a_file_results_go_to_stdout_in_input_order(workers, prompts, expected):
    answer = manager(
        "batch", "--prompts", prompts(PROMPTS), "--max-new-tokens", "5", "--workers", workers.option
    )
    assert answer.returncode == 0, answer.stderr
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [it["text"] for it in results] == [expected(prompt, 5) for prompt in PROMPTS]


def test_rows_set_their_own_options_and_failing_ones_stop_no_other(
    workers, tiny, prompts, expected, tmp_path
):
    rows = [
        {"id": "short", "prompt": "fox", "max_new_tokens": 3},
        {"id": "empty", "prompt": ""},
        {"id": "chat", "messages": [{"role": "user", "content": "fox"}]},
        {"id": "long", "prompt": "fox " * 5000},
        {"id": 5, "prompt": "the quick", "category": "a column of a data set"},
    ]
    output = tmp_path / "o.jsonl"
    answer = manager(
        *("batch", "--prompts", prompts(rows), "--max-new-tokens", "6"),
        *("--workers", workers.option, "--output", str(output)),
    )
    results = {it["id"]: it for it in read(output)}
    assert list(results) == ["short", "empty", "chat", "long", 5]
    assert results["short"]["text"] == expected("fox", 3)
    assert results[5]["text"] == expected("the quick", 6)
    chat = tiny.tokenizer.apply_chat_template(
        rows[2]["messages"], tokenize=False, add_generation_prompt=True
    )
    assert results["chat"]["messages"] == rows[2]["messages"]
    assert results["chat"]["text"] == expected(chat, 6)
    assert "the prompt is empty" in results["empty"]["error"]
    assert "context of 4096" in results["long"]["error"]
    assert results["long"]["finish_reason"] == "error"
    assert answer.returncode == 1
    assert last_line(answer.stderr) == (
        f"manager: 2 of 5 rows failed: {output} has why, row by row"
    )


def test_chat_puts_plain_prompts_into_the_template(workers, tiny, prompts, expected):
    answer = manager(
        *("batch", "--prompts", prompts(["fox"]), "--chat", "--system", "Be brief."),
        *("--max-new-tokens", "6", "--workers", workers.option),
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}]
    chat = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert json.loads(answer.stdout)["text"] == expected(chat, 6)


def test_the_same_seed_draws_the_same_texts_whatever_runs_beside(workers, prompts):
    def texts(*words):
        answer = manager(
            *("batch", "--prompts", prompts(PROMPTS), "--temperature", "1", "--seed", "7"),
            *("--max-new-tokens", "8", "--workers", workers.option, *words),
        )
        assert answer.returncode == 0, answer.stderr
        return [json.loads(line)["text"] for line in answer.stdout.splitlines()]

    assert texts("--batch-size", "1") == texts("--batch-size", "5")


def test_the_example_runs_on_the_demo_model_over_workers_of_its_own():
    example = ROOT / "examples" / "prompts" / "docstrings.jsonl"
    answer = manager("batch", "--prompts", str(example), "--spawn", "2", "--max-new-tokens", "8")
    assert answer.returncode == 0, answer.stderr
    results = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [it["id"] for it in results] == ["parser", "sorted", "warm"]
    assert all(it["text"] for it in results)


def test_a_terminal_sees_rows_rate_and_time_left(workers, prompts):
    said = run_on_a_terminal(
        *("batch", "--prompts", prompts(["fox"] * 6), "--max-new-tokens", "30"),
        *("--batch-size", "2", "--workers", workers.option),
    )
    assert "rows" in said
    assert "tokens/s, about" in said
    assert "left" in said


# --- interrupted, and resumed --------------------------------------------------------------------


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
        threading.Event().wait(0.01)


def test_an_interrupted_batch_goes_on_where_it_ended(workers, prompts, expected, tmp_path):
    texts = [f"{prompt} {number}" for number in range(20) for prompt in PROMPTS[:2]]
    output, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    words = [
        *("--prompts", prompts(texts), "--max-new-tokens", "40", "--batch-size", "2"),
        *("--workers", workers.option, "--output", str(output)),
    ]
    with running_batch(*words) as process:
        wait_for_rows(partial, 3, process)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=120)[1].decode()
    kept = read(partial)[1:]
    assert process.returncode == 130
    assert last_line(stderr) == (
        f"manager: interrupted: {len(kept)} of 40 rows are kept in {partial}: "
        "run the same command again to go on"
    )
    assert not output.exists()

    other = manager("batch", *words, "--max-new-tokens", "39")
    assert other.returncode == 2
    assert "begun with max_new_tokens 40, now it is 39" in one_line(other.stderr)

    again = manager("batch", *words, "--metrics", str(tmp_path / "m.json"))
    assert again.returncode == 0, again.stderr
    assert f"going on: {len(kept)} of 40 rows are done already" in again.stderr
    assert not partial.exists()
    results = read(output)
    assert [it["prompt"] for it in results] == texts
    assert [it["text"] for it in results[:4]] == [expected(text, 40) for text in texts[:4]]
    for line in kept:  # not one of them ran twice: its times are those of the first run
        assert results[line["result"]["index"]] == line["result"]
    assert json.loads((tmp_path / "m.json").read_text())["completed"] == 40 - len(kept)

    third = manager("batch", *words)
    assert third.returncode == 2
    assert "is there already: pass --overwrite" in one_line(third.stderr)


def test_a_lost_worker_ends_the_batch_and_its_rows_are_kept(
    start, workers, tiny, prompts, tmp_path
):
    chain = start(*sections_of(tiny.folder, 2, "--kv-memory", "64MB"))
    output, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    words = [
        *("--prompts", prompts(["fox", "the quick"] * 20), "--max-new-tokens", "40"),
        *("--batch-size", "2", "--output", str(output), "--recovery-timeout", "0"),
    ]
    with running_batch(*words, "--workers", chain.option) as process:
        wait_for_rows(partial, 2, process)
        chain.processes[1].kill()
        stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1
    num_kept = len(read(partial)) - 1
    line = last_line(stderr)
    assert line.startswith(f"manager: worker {chain.addresses[1]} was lost: ")
    assert line.endswith(
        f"; {num_kept} of 40 rows are kept in {partial}: run the same command again to go on"
    )
    again = manager("batch", *words, "--workers", workers.option)
    assert again.returncode == 0, again.stderr
    assert {it["error"] for it in read(output)} == {None}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_batch_and_what_is_done_is_kept(
    workers, prompts, small_disk, tmp_path
):
    output, partial = small_disk / "o.jsonl", small_disk / "o.jsonl.partial"
    words = [
        *("--prompts", prompts(["fox " * 400] * 40), "--max-new-tokens", "3"),
        *("--batch-size", "4", "--workers", workers.option, "--output", str(output)),
    ]
    full = manager("batch", *words)
    num_kept = len(read(partial)) - 1
    assert full.returncode == 1
    assert 0 < num_kept < 40
    assert last_line(full.stderr) == (
        f"manager: cannot write {partial}: No space left on device; {num_kept} of 40 rows are "
        f"kept in {partial}: run the same command again to go on"
    )
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    again = manager("batch", *words)
    assert again.returncode == 0, again.stderr
    assert f"going on: {num_kept} of 40" in again.stderr
    assert len(read(output)) == 40


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_device_is_one_sentence(workers, prompts):
    answer = manager(
        *("batch", "--prompts", prompts(PROMPTS), "--max-new-tokens", "3"),
        *("--workers", workers.option, "--output", "/dev/full"),
    )
    assert answer.returncode == 1
    assert "cannot write the results to /dev/full: No space left" in last_line(answer.stderr)
    assert not os.path.exists("/dev/full.partial")


# --- refused before anything runs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompts", "none.txt"], "none.txt: there is no such file"),
        (["--prompts", "empty.txt"], "empty.txt has no prompt in it"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2: not JSON"),
        (["--prompts", "p.txt", "--adapter", "lora", "--spawn", "1"], "hold no adapter yet"),
        (["--prompts", "p.txt", "--model", "a", "--base_model", "b"], "name different models"),
        (["--prompts", "p.txt", "--json"], "pass --output FILE"),
        (["--prompts", "p.txt", "--overwrite"], "pass --output FILE"),
        (["--prompts", "p.txt", "--system", "x"], "pass --chat as well"),
        (["--prompts", "p.txt", "--output", "there.jsonl"], "pass --overwrite"),
        (["--prompts", "p.txt", "--output", "no/o.jsonl"], "there is no folder"),
        (["--prompts", "p.txt", "--metrics", "no/m.json"], "there is no folder"),
        (["--prompts", "p.txt", "--trace", "."], "is a folder"),
        (["--prompts", "p.txt", "--output", "p.txt", "--overwrite"], "are the same file"),
        (["--prompts", "p.txt", "--output", "o", "--metrics", "./o"], "are the same file"),
        (["--prompts", "p.txt", "--batch-size", "0"], "--batch-size"),
        (["--prompts", "p.txt", "--iters", "0"], "--iters"),
        (["--prompts", "p.txt", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompts", "p.txt", "--temperature", "-1"], "temperature is -1"),
        ([], "--prompts"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(tmp_path, words, said):
    files = {
        "p.txt": "fox\n",
        "empty.txt": "\n",
        "bad.jsonl": '{"prompt": "a"}\n{',
        "there.jsonl": "mine\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    answer = subprocess.run(
        [sys.executable, "-m", "manager", "batch", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean_environment(),
        timeout=60,
        check=False,
    )
    assert answer.returncode == 2
    assert said in one_line(answer.stderr)
    assert answer.stdout == ""
    assert {it.name: it.read_text() for it in tmp_path.iterdir()} == files


def test_a_model_without_a_template_refuses_conversations_before_anything_runs(
    start, tmp_path, prompts
):
    from tests.support.chains import save_tiny_with_tokenizer

    model = save_tiny_with_tokenizer(tmp_path / "model", chat=False)
    chain = start(*sections_of(model.folder, 1, "--kv-memory", "16MB"))
    rows = [{"prompt": "a" * 99}] * 40 + [{"messages": [{"role": "user", "content": "fox"}]}]
    answer = manager(
        *("batch", "--prompts", prompts(rows), "--workers", chain.option),
        *("--output", str(tmp_path / "o.jsonl")),
    )
    assert answer.returncode == 2
    assert "has no chat template" in one_line(answer.stderr)
    assert not list(tmp_path.glob("o.jsonl*"))


# --- trace ---------------------------------------------------------------------------------------


def test_the_trace_has_queue_compute_and_send_of_every_step_and_worker(workers, prompts, tmp_path):
    answer = manager(
        *("batch", "--prompts", prompts(PROMPTS), "--max-new-tokens", "10"),
        *("--workers", workers.option, "--trace", str(tmp_path / "t.json")),
    )
    assert answer.returncode == 0, answer.stderr
    view = read_trace(tmp_path / "t.json")
    assert sum(view.tokens.values()) >= 10 * len(PROMPTS)
    assert set(view.lanes) == set(workers.addresses)
    for lanes in view.lanes.values():
        assert set(lanes) == {"queue", "compute", "send"}
        assert all(set(steps) == set(view.tokens) for steps in lanes.values())
    first, second = (view.lanes[address]["compute"] for address in workers.addresses)
    for step in view.tokens:  # on one machine all clocks are the same to a few microseconds
        assert view.issued_us[step] <= first[step][0] + CLOCK_US
        assert first[step][1] <= second[step][0] + CLOCK_US
        assert second[step][1] <= view.returned_us[step] + CLOCK_US


CLOCK_US = 5000  # what a busy machine can put between a ping and its answer


def test_an_interrupted_trace_is_whole(workers, prompts, tmp_path):
    words = [
        *("--prompts", prompts(["fox"] * 40), "--max-new-tokens", "40", "--batch-size", "2"),
        *("--workers", workers.option, "--output", str(tmp_path / "o.jsonl")),
        *("--trace", str(tmp_path / "t.json")),
    ]
    with running_batch(*words) as process:
        wait_for_rows(tmp_path / "o.jsonl.partial", 2, process)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    events = json.loads((tmp_path / "t.json").read_text())
    assert sum(it["ph"] == "X" for it in events) > 80


def run_on_a_terminal(*words):
    """What the command writes to a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "manager", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        cwd=ROOT / "tests",
        env=clean_environment({"TERM": "xterm", "COLUMNS": "120"}),
    )
    os.close(theirs)
    said = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while chunk := terminal.read(4096):
                said += chunk
        except OSError:  # Linux says so when the other end is closed
            pass
    assert process.wait(120) == 0, said.decode()
    return said.decode()
