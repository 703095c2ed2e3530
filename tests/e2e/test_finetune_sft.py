"""`manager finetune sft` as real processes under a real launcher: together, ended, killed, refused.

Each launch loads torch, transformers and trl in every process: much is asserted of each.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.jobs.sft import run_sft
from engine.jobs.sft_job import SftJob
from engine.jobs.sft_messages import Failed, Hello, decode
from engine.jobs.stopping import StopRequest
from tests.support.finetuning import (
    EXCHANGES,
    Watching,
    job_settings,
    losses_of,
    metrics_of,
    run,
    save_model,
    validation_losses_of,
    write_jsonl,
)
from tests.support.processes import ROOT, clean_environment

PATIENCE_S = 120
STEPS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)


def words_of(model, data, save_dir, *more):
    return [
        sys.executable, "-m", "manager", "finetune", "sft", "--base-model", str(model),
        "--train-path", str(data), "--val-path", str(data), "--save-dir", str(save_dir),
        "--lora-r", "4", "--lora-alpha", "8", "--lora-dropout", "0", "--lr", "1e-2",
        "--no-tensorboard", "--no-cuda", *map(str, more),
    ]  # fmt: skip


def start(words):
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=clean_environment(),
    )  # fmt: skip


def finish(words):
    with start(words) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def job_of(settings, num_processes):
    return SftJob(
        settings=replace(settings, method="sft"), num_processes=num_processes, on_cpu=True,
        mixed_precision="no", timeout_s=60,
    )  # fmt: skip


def wait_for_step(step, save_dir, process):
    give_up_s = time.monotonic() + PATIENCE_S
    path = save_dir / "metrics.jsonl"
    while not (path.exists() and f'"event": "train", "step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up_s
        time.sleep(0.01)  # a file tells nobody that it grew


def launched(save_dir):
    """Rank to process of what was launched for a run."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_launcher = "accelerate.commands.accelerate_cli" in words
        if is_launcher or not any(str(save_dir) in word for word in words):
            continue
        if "engine.jobs.sft_process" in words:
            try:
                found[int(process.environ().get("RANK", "0"))] = process
            except psutil.Error:
                continue
    return found


def wait_until_nobody_is_left(save_dir):
    give_up_s = time.monotonic() + PATIENCE_S
    while left := launched(save_dir):
        assert time.monotonic() < give_up_s, left
        time.sleep(0.05)


def expected(model, data, steps, tmp_path, **training):
    """One process, twice the batch, in the loop that `manager finetune lora` has."""
    settings = job_settings(
        model, data, tmp_path / "alone", validation=data, max_steps=steps, batch_size=8,
        lora={"dropout": 0.0}, output={"merge": False}, **training,
    )  # fmt: skip
    run(settings)
    return tmp_path / "alone"


def test_two_processes_of_4_rows_learn_what_one_of_8_learns(model, data, tmp_path):
    save_dir = tmp_path / "run"
    code, out, err = finish(
        words_of(model, data, save_dir, "--max-steps", 12, "--batch-size", 4, "--num-processes", 2,
                 "--json", "--log-file", tmp_path / "my.log")
    )  # fmt: skip
    assert code == 0, err
    alone = expected(model, data, 12, tmp_path)
    assert losses_of(save_dir) == pytest.approx(losses_of(alone), abs=1e-5)
    assert dict(validation_losses_of(save_dir)) == pytest.approx(
        dict(validation_losses_of(alone)), abs=1e-5
    )
    told = [[{key: it.get(key) for key in ("event", "step", "tokens", "samples", "rows")}
             for it in metrics_of(way)] for way in (save_dir, alone)]  # fmt: skip
    assert told[0] == told[1]

    said = json.loads(out)
    assert said["steps"] == 12 and said["merged_model"] == str(save_dir / "merged_model")
    assert Path(said["merged_model"], "model.safetensors").is_file()
    assert "4 x 1 x 2 (batch, accumulation, processes)" in Path(said["report"]).read_text()
    assert "[memory] step 12: CPU" in (tmp_path / "my.log").read_text()
    config = json.loads((save_dir / "lora_adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)

    # On the terminal is what we say, and nothing of what the launcher and the libraries print.
    assert err.count("training begins: 7 rows, 12 steps of 8 rows") == 1
    assert "step 12/12" in err and "2 x cpu in float32" in err
    assert not [word for word in ("Warning", "warn", "torchrun", "W1", "Traceback") if word in err]

    launch = save_dir / "launch"
    yaml = (launch / "accelerate-machine0.yaml").read_text()
    assert "num_processes: 2\n" in yaml and "--multi_gpu" in yaml.splitlines()[0]
    job = json.loads((launch / "job-machine0.json").read_text())
    assert job["num_processes"] == 2 and job["settings"]["training"]["batch_size"] == 4
    assert {it.name for it in launch.glob("*.log")} == {
        "launcher-machine0.log", "process0.log", "process1.log",
    }  # fmt: skip


def test_a_run_killed_and_ended_goes_on_as_if_nothing_had_been(model, data, tmp_path):
    save_dir = tmp_path / "run"
    words = words_of(
        model, data, save_dir, "--max-steps", STEPS, "--batch-size", 4, "--save-steps", 5,
        "--num-processes", 2, "--resume", "--no-merge", "--eval-steps", 100, "--lr", "1e-3",
    )  # fmt: skip
    with start(words) as process:
        wait_for_step(8, save_dir, process)
        assert set(launched(save_dir)) == {0, 1}
        process.kill()
        process.communicate(timeout=PATIENCE_S)
    wait_until_nobody_is_left(save_dir)

    with start(words) as process:
        wait_for_step(25, save_dir, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "training goes on after step" in err
    last = err.splitlines()[-1]
    stopped_at = metrics_of(save_dir)[-1]["step"]
    assert last == (
        f"manager: stopped after step {stopped_at} of {STEPS}: {save_dir}/checkpoints/"
        f"step-{stopped_at:08d} is whole, go on from it with --resume"
    )
    assert not launched(save_dir)

    # In other parts, and here: what counts are the rows of a step.
    settings = job_settings(
        model, data, save_dir, validation=data, max_steps=STEPS, batch_size=8, learning_rate=1e-3,
        lora={"dropout": 0.0}, output={"merge": False, "resume": True},
    )  # fmt: skip
    run_sft(job_of(settings, 1), Watching(), StopRequest())
    alone = expected(model, data, STEPS, tmp_path, learning_rate=1e-3)
    # Rounding grows over the steps; a run that lost one would be far away.
    assert losses_of(save_dir) == pytest.approx(losses_of(alone), rel=1e-3)
    assert len(losses_of(save_dir)) == STEPS
    assert not list(save_dir.rglob(".partial-*"))


@pytest.mark.parametrize("stopped", [False, True], ids=["alone", "then stopped by the scheduler"])
def test_a_process_that_dies_takes_the_run_with_it_and_is_named(model, data, tmp_path, stopped):
    save_dir = tmp_path / "run"
    words = words_of(
        model, data, save_dir, "--max-steps", 100000, "--batch-size", 4, "--gpus-per-node", 2
    )
    with start(words) as process:
        wait_for_step(5, save_dir, process)
        processes = launched(save_dir)
        launcher = processes[0].parent()
        if stopped:  # the launcher sees the death only after the signal
            launcher.suspend()
        processes[1].kill()
        if stopped:
            wait_for_death(processes[0])
            process.terminate()
            launcher.resume()
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert err.splitlines()[-1] == (
        f"manager: process 1 of 2 on {socket.gethostname()} was ended by SIGKILL (as the kernel "
        "ends one when memory is short: try a smaller --batch-size); its log is "
        f"{save_dir}/launch/process1.log, and --resume goes on from the last checkpoint."
    )
    assert "Traceback" not in err
    wait_until_nobody_is_left(save_dir)


def wait_for_death(process: psutil.Process) -> None:
    """Until its parent could take note of its end."""
    give_up_s = time.monotonic() + PATIENCE_S
    while process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up_s, process
        time.sleep(0.01)  # a death of another's child tells nobody


def test_a_launcher_that_starts_fewer_processes_is_found_out(model, data, tmp_path):
    launch = tmp_path / "launch"
    launch.mkdir()
    settings = job_settings(model, data, tmp_path / "run")
    job = job_of(settings, 2)
    (launch / "job.json").write_text(json.dumps(job.to_json()))
    # accelerate takes this, and starts one process without a word.
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2",
             "--module", "engine.jobs.sft_process", str(launch / "job.json")]  # fmt: skip
    lifeline, end = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, *words], stdin=lifeline, capture_output=True, text=True, check=False,
            cwd=ROOT, env=clean_environment(), timeout=PATIENCE_S,
        )  # fmt: skip
    finally:
        os.close(lifeline)
        os.close(end)
    messages = [it for line in done.stdout.splitlines() if (it := decode(line))]
    assert isinstance(messages[0], Hello) and messages[0].rank == 0
    assert isinstance(messages[-1], Failed)
    assert "1 of 2 processes train together here" in messages[-1].sentence
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_named(model, data, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = finish(
            words_of(model, data, tmp_path / "run", "--num-machines", 2, "--machine-rank", 0,
                     "--main-process-ip", "127.0.0.1", "--main-process-port", port)
        )  # fmt: skip
    assert code == 1
    assert err.splitlines()[-1] == (
        f"manager: port {port} of 127.0.0.1 is taken: name a free one with --main-process-port, "
        "the same on all machines; the launcher's log is "
        f"{tmp_path}/run/launch/launcher-machine0.log."
    )


def test_bad_data_is_one_line_as_without_a_launcher(model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    code, out, err = finish(words_of(model, bad, tmp_path / "run"))
    assert code == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith(f"manager: {bad}:2") and "launch" not in last
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "run" / "launch" / "process0.log").read_text()
