"""The `worker` command: what it prints, how it refuses, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proto.errors import AuthenticationFailed, WorkerRefused
from tests.support.processes import (
    READY,
    ROOT,
    WorkerProcess,
    clean_environment,
    run_worker,
)
from tests.support.wire import DEADLINE_S, open_link
from worker import cli
from worker.config import WorkerConfig

Refuse = Callable[..., str]


@pytest.fixture
def refusal(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refuse:
    """Run the command in this process, expect exit 2, and return its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as left:
            cli.main(list(args))
        said = capfd.readouterr()
        assert left.value.code == 2
        assert said.out == ""
        lines = said.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("worker: "), said.err
        return lines[0].removeprefix("worker: ")

    return run


def config_of(*args: str) -> WorkerConfig:
    """What the options, the environment and ./comboio.toml come to."""
    invocation = cli._parse(list(args))
    assert isinstance(invocation, cli.Invocation)
    return invocation.config


# --- workers that share a machine ------------------------------------------------------------


def test_workers_that_only_this_machine_reaches_divide_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    here = ("--sections", "2", "--index", "0")
    assert config_of(*here).threads == share
    assert config_of(*here, "--threads", "7").threads == 7
    assert config_of().threads is None  # the whole model, alone: torch's own choice
    assert config_of(*here, "--listen", "192.0.2.1:7710", "--insecure").threads is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert config_of(*here).threads is None


# --- help, and what torch costs --------------------------------------------------------------


def test_help_and_version_and_a_bad_option_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from worker.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print({'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
    )
    for args, words in (
        (["--help"], "ready HOST:PORT"),
        (["--version"], "worker (comboio)"),
        (["--index", "2", "--sections", "2"], ""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            env=clean_environment(),
            cwd=ROOT,
            check=False,
        )
        assert words in done.stdout
        assert done.stdout.endswith("set()\n")


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["--index", "2", "--sections", "2"],
            "--index 2 is out of range for --sections 2: it must be 0 to 1.",
        ),
        (["--sections", "2"], "--sections 2 needs --index I beside it."),
        (["--index", "1"], "--index 1 needs --sections N beside it."),
        (["--sections", "0", "--index", "0"], "--sections 0: a model has at least 1 section."),
        (
            ["--layers", "0:2", "--sections", "2", "--index", "0"],
            "give either --layers A:B, or --sections N with --index I.",
        ),
        (["--layers", "3:3"], "--layers 3:3 holds no layer: write A:B with A < B."),
        (
            ["--layers", "3"],
            "--layers '3' is not A:B, a half-open range of layers as in 0:12.",
        ),
        (
            ["--kv-memory", "5q"],
            "--kv-memory '5q' is not a size; write for example 512MB, 1.5GiB, or bytes.",
        ),
        (["--kv_memory", "0"], "--kv-memory 0 holds no sequence: give it at least some megabytes."),
        (["--threads", "0"], "--threads 0: at least 1 thread must compute."),
        (["--dtype", "int3"], "--dtype int3: it must be one of auto, float32, bfloat16, float16."),
        (["--device", "tpu"], "--device tpu: it must be auto, cpu, cuda or cuda:K."),
        (["--quantize", "int7"], "--quantize int7: it must be one of none, int8, int4."),
        (["--compress", "yes"], "--compress yes: it must be one of auto, on, off."),
        (["--kv-quantize", "int4"], "--kv-quantize int4: it must be one of none, int8."),
        (
            ["--cuda-graphs", "on"],
            "--cuda-graphs on: it must be one of auto, off.",
        ),
        (
            ["--quantize", "int4", "--quantize-head", "int4"],
            "--quantize-head int4: it must be one of auto, int8, same.",
        ),
        (
            ["--quantize-head", "same"],
            "--quantize-head same means nothing where no weights are quantized: pass --quantize "
            "int8 or int4 as well.",
        ),
        (
            ["--cache-size", "lots"],
            "--cache-size 'lots' is not a size; write for example 512MB, 1.5GiB, or bytes.",
        ),
        (["--cache-size", "0"], "--cache-size 0 keeps nothing: pass --no-cache instead."),
        (["--cache-dir", " "], "--cache-dir '' names no folder: name one, or pass --no-cache."),
        (
            ["--cache-dir", "here", "--no-cache"],
            "--cache-dir and --no-cache say opposite things: pass one of them.",
        ),
        (["--threads", "many"], "Invalid value for '--threads': 'many' is not a valid integer."),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence(
    refusal: Refuse, args: list[str], sentence: str
) -> None:
    assert refusal(*args) == sentence


def test_listening_beyond_this_machine_needs_a_secret_and_says_so(refusal: Refuse) -> None:
    sentence = refusal("--listen", "0.0.0.0:7710")
    assert sentence.startswith("--listen 0.0.0.0:7710 lets other machines in")
    assert "--secret-file" in sentence and "--insecure" in sentence
    assert config_of("--listen", "0.0.0.0:0", "--insecure").insecure


def test_a_secret_file_opens_the_door_and_a_missing_one_does_not(
    refusal: Refuse, tmp_path: Path
) -> None:
    assert "gone" in refusal("--secret-file", "gone")
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef\n")
    secret.chmod(0o600)
    config = config_of("--listen", "0.0.0.0:0", "--secret-file", str(secret))
    assert config.keys.secret == b"0123456789abcdef"


def test_a_port_in_use_is_refused_before_anything_heavy_is_loaded(refusal: Refuse) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = run_worker("--listen", address)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"worker: cannot listen on {address}: the port is in use")


def test_a_model_that_is_not_there_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = run_worker(
        "--model", str(tmp_path / "nothing"), "--listen", "127.0.0.1:0", "--log-level", "warning"
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("worker: ") and str(tmp_path / "nothing") in line


# --- where settings come from ----------------------------------------------------------------


def test_an_option_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comboio.toml").write_text(
        '[worker]\nthreads = 1\nkv-memory = "1KiB"\ndtype = "float16"\nmodel = "a"\n'
    )
    monkeypatch.setenv("COMBOIO_KV_MEMORY", "2KiB")
    monkeypatch.setenv("COMBOIO_DTYPE", "bfloat16")
    config = config_of("--dtype", "float32")
    assert (config.threads, config.kv_memory_bytes, config.dtype) == (1, 2048, "float32")
    assert config.model == "a"


def test_typed_layers_override_sections_from_a_setting_and_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMBOIO_SECTIONS", "3")
    monkeypatch.setenv("COMBOIO_INDEX", "1")
    assert config_of().index == 1
    assert config_of("--layers", "0:2").sections is None
    monkeypatch.setenv("COMBOIO_LAYERS", "0:2")
    assert config_of("--sections", "2", "--index", "0").layers is None


def test_the_default_port_follows_the_index(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(config_of().listen) == "127.0.0.1:7710"
    assert str(config_of("--sections", "4", "--index", "3").listen) == "127.0.0.1:7713"


def test_an_unknown_key_in_the_file_is_named(refusal: Refuse, tmp_path: Path) -> None:
    (tmp_path / "comboio.toml").write_text("[worker]\nkv-memmory = 5\n")
    sentence = refusal()
    assert sentence == (
        "unknown key 'kv-memmory' in [worker] of comboio.toml: did you mean 'kv_memory'?"
    )


def test_a_bad_value_says_which_setting_it_came_from(
    refusal: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMBOIO_THREADS", "many")
    assert refusal().endswith("(from COMBOIO_THREADS).")
    monkeypatch.delenv("COMBOIO_THREADS")
    (tmp_path / "comboio.toml").write_text('[worker]\nlog-level = "loud"\n')
    assert refusal().endswith("(from log-level in [worker] of comboio.toml).")


def test_debug_shows_the_traceback_as_well(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["--layers", "3", "--debug"])
    error = capfd.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("worker: --layers")


# --- a worker's life -------------------------------------------------------------------------


def test_the_ready_line_says_who_holds_what_and_bytes_held_are_bytes_read(
    first: WorkerProcess, last: WorkerProcess, checkpoint: Path
) -> None:
    matches = [READY.fullmatch(worker.ready_line) for worker in (first, last)]
    found = [match.groupdict() for match in matches if match]
    assert [it["section"] for it in found] == ["0/2", "1/2"]
    assert [(it["start"], it["end"], it["layers"]) for it in found] == [
        ("0", "2", "4"),
        ("2", "4", "4"),
    ]
    assert {it["model"] for it in found} == {checkpoint.name}
    assert all(int(it["bytes"]) > 0 for it in found)


async def test_while_it_loads_a_manager_is_refused_with_how_far_it_is(checkpoint: Path) -> None:
    arguments = ("--model", checkpoint.name, "--layers", "1:3", "--log-format", "json")
    with WorkerProcess(*arguments, cwd=checkpoint.parent, wait=False) as worker:
        listening = await asyncio.to_thread(worker.wait_for_stderr, "listening")
        address = json.loads(listening)["address"]
        with pytest.raises(WorkerRefused, match=r"is still loading \(\d+ %\)"):
            await open_link(address)
        await asyncio.to_thread(worker.wait_until_ready)
        assert "section -/- layers 1:3 of 4" in worker.ready_line
        link = await open_link(worker.address)
        assert link.welcome is not None
        assert (link.welcome.worker.section, link.welcome.worker.model_path) == (
            None,
            str(checkpoint),
        )
        await link.close()
        assert worker.stop() == 0
    assert all(json.loads(line)["event"] for line in worker.said.splitlines())


def test_sigint_while_it_loads_ends_it_with_0(checkpoint: Path) -> None:
    with WorkerProcess("--model", str(checkpoint), wait=False) as worker:
        worker.wait_for_stderr("listening")
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(DEADLINE_S) == 0
        assert "Traceback" not in worker.stderr


async def test_a_worker_with_a_secret_lets_in_only_who_knows_it(tmp_path: Path) -> None:
    """No stage is needed for that: the door comes first."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret of this test")
    secret.chmod(0o600)
    with WorkerProcess("--secret-file", str(secret), "--log-format", "json", wait=False) as worker:
        listening = await asyncio.to_thread(worker.wait_for_stderr, "listening")
        address = json.loads(listening)["address"]
        with pytest.raises(WorkerRefused, match="still loading"):
            await open_link(address, secret=secret.read_bytes())
        with pytest.raises((AuthenticationFailed, WorkerRefused), match="--secret-file"):
            await open_link(address)
