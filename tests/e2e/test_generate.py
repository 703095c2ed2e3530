"""`manager generate` as people type it, over real workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import psutil
import pytest

from manager.pipeline import Pipeline
from tests.support.chains import manager, save_tiny_with_tokenizer, sections_of, start_manager
from tests.support.processes import ROOT

KEYS = {
    "text",
    "token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "ttft_s",
    "decode_tokens_per_s",
    "workers",
}


def one_line(stderr: str) -> str:
    """The only line of an error."""
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("manager: ")
    return lines[0]


def test_text_goes_to_stdout_and_what_it_took_to_stderr(workers, tiny):
    answer = manager("generate", "the quick", "--workers", workers.option, "--max_new_tokens", "20")
    prompt = tiny.tokenizer("the quick")["input_ids"]
    expected = tiny.tokenizer.decode(tiny.greedy(prompt, 20), skip_special_tokens=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.removesuffix("\n") == expected.removesuffix("\n")
    last = answer.stderr.splitlines()[-1]
    assert "20 tokens, " in last
    assert "tokens/s" in last
    for process in workers.processes:
        assert process.address in last


def test_json_is_one_object_with_exactly_these_keys(call, workers, tiny):
    answer = call("generate", "fox", "--json", "--workers", workers.option, "--max-new-tokens", "7")
    said = json.loads(answer.stdout)
    assert set(said) == KEYS
    assert said["token_ids"] == tiny.greedy(tiny.tokenizer("fox")["input_ids"], 7)
    assert said["text"] == tiny.tokenizer.decode(said["token_ids"], skip_special_tokens=True)
    assert said["finish_reason"] == "length"
    assert said["completion_tokens"] == 7
    assert [it["address"] for it in said["workers"]] == workers.addresses


def test_a_prompt_on_stdin_is_the_same_prompt(workers):
    words = ["--workers", workers.option, "--max-new-tokens", "8", "--json"]
    piped = manager("generate", "-", *words, stdin="naïve café\n")
    typed = manager("generate", "naïve café", *words)
    assert json.loads(piped.stdout)["token_ids"] == json.loads(typed.stdout)["token_ids"]


def test_a_conversation_goes_through_the_models_chat_template(call, workers, tiny):
    answer = call(
        *("generate", "fox?", "--chat", "--system", "Be brief.", "--json"),
        *("--workers", workers.option, "--max-new-tokens", "5"),
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "fox?"},
    ]
    text = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = json.loads(answer.stdout)
    assert said["prompt_tokens"] == len(prompt)
    assert said["token_ids"] == tiny.greedy(prompt, 5)


def test_stop_texts_and_seeds_are_heard(call, workers):
    words = ["--workers", workers.option, "--max-new-tokens", "40", "--json"]
    drawn = ["--temperature", "1.2", "--top-k", "50", "--seed", "3"]
    first = json.loads(call("generate", "dog", *words, *drawn).stdout)
    again = json.loads(call("generate", "dog", *words, *drawn).stdout)
    assert again["token_ids"] == first["token_ids"]
    stop = first["text"][6:8]
    stopped = json.loads(call("generate", "dog", *words, *drawn, "--stop", stop).stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == first["text"][: first["text"].index(stop)]


def test_spawned_workers_are_gone_afterwards(tiny):
    answer = manager("generate", "fox", "--spawn", "2", "--model", str(tiny.folder), "--json")
    said = json.loads(answer.stdout)
    assert len(said["workers"]) == 2
    expected = tiny.greedy(tiny.tokenizer("fox")["input_ids"], 128)
    assert said["token_ids"] == expected[: said["completion_tokens"]]
    assert "2 workers ready" in answer.stderr


def test_a_spawned_workers_own_sentence_is_what_one_reads(tmp_path):
    answer = manager("generate", "fox", "--spawn", "1", "--model", str(tmp_path))
    assert answer.returncode == 2
    assert str(tmp_path) in one_line(answer.stderr)


def test_an_interruption_while_workers_start_leaves_none_behind():
    running = start_manager("generate", "fox", "--spawn", "2")
    while len(started := psutil.Process(running.pid).children()) < 2:
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130
    assert one_line(stderr.decode()) == "manager: interrupted"
    assert not any(worker.is_running() for worker in started)


def test_an_interruption_is_heard_while_torch_is_being_imported(workers, tmp_path):
    """From an SD card that takes a minute; here it takes for ever."""
    os.mkfifo(tmp_path / "never")
    (tmp_path / "torch.py").write_text(f"open({str(tmp_path / 'never')!r}).read()")
    paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
    running = start_manager(
        "generate", "fox", "--workers", workers.option, env={"PYTHONPATH": paths}
    )
    with open(tmp_path / "never", "w"):  # returns as soon as the import reads it
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 130
    assert one_line(stderr.decode()) == "manager: interrupted"


def test_a_worker_that_dies_on_the_way_leaves_the_text_so_far(tiny, start):
    chain = start(*sections_of(tiny.folder, 2))
    running = start_manager(
        *("generate", "fox", "--workers", chain.option, "--max-new-tokens", "3000"),
        *("--recovery-timeout", "0"),
    )
    assert running.stdout is not None
    begun = running.stdout.read(1)
    chain.processes[1].kill()
    stdout, stderr = running.communicate(timeout=120)
    assert running.returncode == 1
    assert begun + stdout
    assert chain.addresses[1] in one_line(stderr.decode())


def test_with_json_a_lost_worker_still_prints_the_object(tiny, start):
    chain = start(*sections_of(tiny.folder, 1))
    words = ["generate", "fox", "--workers", chain.option, "--max-new-tokens", "3000", "--json"]
    running = start_manager(*words, "--recovery-timeout", "0")
    asyncio.run(wait_for_steps(chain.addresses, 30))
    chain.processes[0].kill()
    stdout, stderr = running.communicate(timeout=120)
    said = json.loads(stdout)
    assert running.returncode == 1
    assert said["finish_reason"] == "error"
    assert said["completion_tokens"] == len(said["token_ids"]) > 0
    assert chain.addresses[0] in one_line(stderr.decode())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_the_text_and_frees_the_workers(workers, number):
    running = start_manager(
        "generate", "fox", "--workers", workers.option, "--max-new-tokens", "3000"
    )
    assert running.stdout is not None
    assert running.stdout.read(1)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 128 + number
    assert one_line(stderr.decode()) == "manager: interrupted"
    asyncio.run(wait_until_free(workers.addresses))


def test_a_reader_that_goes_away_ends_it_quietly(workers):
    running = start_manager(
        "generate", "fox", "--workers", workers.option, "--max-new-tokens", "3000"
    )
    assert running.stdout is not None
    assert os.read(running.stdout.fileno(), 1)
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == b""
    running.stderr.close()
    assert running.wait(120) == 1
    asyncio.run(wait_until_free(workers.addresses))


def test_a_model_without_a_chat_template_says_so(call, tmp_path, start):
    tiny = save_tiny_with_tokenizer(tmp_path, chat=False)
    chain = start(*sections_of(tiny.folder, 1))
    answer = call("generate", "fox", "--chat", "--workers", chain.option)
    assert answer.returncode == 2
    assert "no chat template" in one_line(answer.stderr)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--temperature", "-1"], 2, "temperature is -1.0"),
        (["--temperature", "warm"], 2, "'warm'"),
        (["--top-p", "0"], 2, "top_p is 0.0"),
        (["--top-k", "-3"], 2, "top_k is -3"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--repetition-penalty", "0"], 2, "repetition_penalty is 0.0"),
        (["--stop", ""], 2, "stop text is empty"),
        (["--system", "Be brief."], 2, "--chat"),
        (["--colour"], 2, "--colour"),
        (["--workers", "127.0.0.1:9"], 1, "no worker answers at 127.0.0.1:9"),
        (["--workers", "here"], 2, "'here'"),
        (["--workers", "a:1", "--spawn", "2"], 2, "--spawn"),
        (["--spawn", "0"], 2, "0 workers"),
    ],
)
def test_bad_input_is_one_sentence(call, words, code, said):
    answer = call("generate", "fox", *words)
    assert (answer.returncode, answer.stdout) == (code, ""), answer.stderr
    assert said in one_line(answer.stderr)


@pytest.mark.parametrize(
    ("stdin", "said"), [("", "the prompt is empty"), ("\n", "empty"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_bad_prompt_on_stdin_is_one_sentence(stdin, said):
    answer = manager("generate", "-", stdin=stdin)
    assert answer.returncode == 2
    assert said in one_line(answer.stderr)


def test_a_variable_gives_a_repeatable_option_one_value(call, workers):
    words = ["generate", "dog", "--json", "--workers", workers.option, "--max-new-tokens", "40"]
    whole = json.loads(call(*words).stdout)["text"]
    stop = whole[5:8]
    stopped = json.loads(call(*words, env={"COMBOIO_STOP": stop}).stdout)
    assert stopped["text"] == whole[: whole.index(stop)]


def test_settings_come_from_option_variable_file_in_this_order(call, workers, tmp_path):
    file = tmp_path / "comboio.toml"
    file.write_text(f'[manager]\nworkers = ["{workers.option}"]\nmax-new-tokens = 5\n')
    env = {"COMBOIO_CONFIG": str(file)}
    by_file = call("generate", "fox", "--json", env=env)
    by_variable = call("generate", "fox", "--json", env=env | {"COMBOIO_MAX_NEW_TOKENS": "4"})
    by_option = call(
        *("generate", "fox", "--json", "--max-new-tokens", "3"),
        env=env | {"COMBOIO_MAX_NEW_TOKENS": "4"},
    )
    counts = [
        json.loads(it.stdout)["completion_tokens"] for it in (by_file, by_variable, by_option)
    ]
    assert counts == [5, 4, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[manager]\ntop-q = 1\n", "'top-q'"),
        ("[manager]\ntop-k = 'many'\n", "top-k in [manager]"),
        ("top-k = 1\n", "[manager]"),
    ],
)
def test_a_bad_setting_is_named_with_its_place(call, tmp_path, text, said):
    file = tmp_path / "comboio.toml"
    file.write_text(text)
    answer = call("generate", "fox", env={"COMBOIO_CONFIG": str(file)})
    assert answer.returncode == 2
    assert said in one_line(answer.stderr)


async def wait_for_steps(addresses: list[str], count: int) -> None:
    """Until the last worker has computed so many steps."""
    async with await Pipeline.open(addresses, max_sequences=1, max_tokens_hint=16) as pipeline:
        while (await pipeline.status())[-1][1].steps < count:
            pass


async def wait_until_free(addresses: list[str]) -> None:
    """Until nobody but the asker has a lease."""
    async with await Pipeline.open(addresses, max_sequences=1, max_tokens_hint=16) as pipeline:
        while any(
            status.free_blocks != status.total_blocks - 1
            for _, status, _ in await pipeline.status()
        ):
            pass
