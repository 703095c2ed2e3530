"""Fine-tuning as real processes: ended, killed, out of disk or memory, served by the pipeline."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.finetuning import (
    EXCHANGES,
    job_settings,
    losses_of,
    metrics_of,
    resumed,
    run,
    save_model,
    validation_losses_of,
    write_jsonl,
)
from tests.support.processes import ROOT, clean_environment

STEPS = 300
PATIENCE_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)


def settings_of(model, data, save_dir):
    return job_settings(
        model, data, save_dir, validation=data, max_steps=STEPS, learning_rate=1e-3, eval_steps=50,
        save_steps=7, lora={"dropout": 0.1},
    )  # fmt: skip


def words_of(settings, *more):
    """The command line of the same job."""
    training = settings.training
    return [
        sys.executable, "-m", "manager", "finetune", "lora", "--base-model", settings.base_model,
        "--train-path", settings.data.train[0], "--val-path", settings.data.validation[0],
        "--save-dir", settings.output.save_dir, "--lora-r", "4", "--lora-alpha", "8",
        "--lora-dropout", "0.1", "--lr", str(training.learning_rate), "--batch-size", "2",
        "--max-steps", str(STEPS), "--eval-steps", "50", "--save-steps", "7", "--no-tensorboard",
        "--no-cuda", "--resume", *more,
    ]  # fmt: skip


def start(words):
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=clean_environment(),
    )  # fmt: skip


def end_after(step, words, save_dir, number):
    """Send a signal once a step is in the metrics; (exit code, stderr)."""
    with start(words) as process:
        give_up_s = time.monotonic() + PATIENCE_S
        while not any(f'"step": {step + late},' in metrics(save_dir) for late in range(20)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up_s
            time.sleep(0.002)  # a file tells nobody that it grew
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
        return process.returncode, said


def metrics(save_dir):
    try:
        return (save_dir / "metrics.jsonl").read_text()
    except OSError:
        return ""


def test_a_run_ended_and_killed_gives_the_losses_of_an_undisturbed_one(model, data, tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    run(settings_of(model, data, calm))
    settings = settings_of(model, data, rough)
    code, said = end_after(40, words_of(settings), rough, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    last = said.splitlines()[-1]
    assert last.startswith("manager: stopped after step ") and "go on from it with --resume" in last
    stopped_at = metrics_of(rough)[-1]["step"]
    assert f"step-{stopped_at:08d} is whole" in last
    code, _ = end_after(stopped_at + 60, words_of(settings), rough, signal.SIGKILL)
    assert code == -signal.SIGKILL
    kept = sorted((rough / "checkpoints").glob("step-*"))[-1]
    assert int(kept.name.removeprefix("step-")) > stopped_at
    run(resumed(settings))
    assert losses_of(rough) == losses_of(calm)
    assert len(losses_of(rough)) == STEPS
    assert validation_losses_of(rough) == validation_losses_of(calm)
    for name in ("lora_adapters/adapter_model.safetensors", "merged_model/model.safetensors"):
        assert (rough / name).read_bytes() == (calm / name).read_bytes()
    assert not list(rough.rglob(".partial-*"))


def test_what_was_trained_is_served_by_the_pipeline(model, data, tmp_path):
    settings = settings_of(model, data, tmp_path / "run")
    result = run(resumed(settings, max_steps=20, learning_rate=3e-2))
    words = [sys.executable, "-m", "manager", "generate", "--spawn", "2", "--json",
             "--max-new-tokens", "12", "The pump "]  # fmt: skip
    with start([*words, "--model", str(result.merged)]) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    expected, before = (generated(it) for it in (result.merged, model))
    assert json.loads(out)["token_ids"] == expected != before


def generated(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer("The pump ")["input_ids"]])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=12, pad_token_id=0)  # fmt: skip
    return found[0, ids.shape[1] :].tolist()


def why_no_small_disk():
    if shutil.which("unshare") is None:
        return "needs unshare"
    trial = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
         "mount -t tmpfs -o size=64k none /mnt"],
        capture_output=True, check=False,
    )  # fmt: skip
    return None if trial.returncode == 0 else "needs user namespaces that may mount"


def test_a_full_disk_ends_a_run_in_one_line_and_leaves_the_last_checkpoint(model, data, tmp_path):
    if reason := why_no_small_disk():
        pytest.skip(reason)
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    settings = settings_of(model, data, disk / "run")
    # Each checkpoint takes 250 kB: the second one does not fit beside the first.
    short = ("--lora-r", "10", "--max-steps", "30", "--tensorboard")
    words = words_of(settings, *short)
    script = 'mount -t tmpfs -o size=400k none "$1" && shift && "$@"; code=$?; cp -r "$DISK" "$OUT"'
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f"{script}; exit $code",
         "sh", str(disk), *words],
        capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, check=False,
        env=clean_environment({"DISK": str(disk / "run"), "OUT": str(out)}),
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert "cannot be written, the disk is full" in last and "step-00000007 is whole" in last
    assert "Traceback" not in ended.stderr
    assert [it.name for it in (out / "checkpoints").iterdir()] == ["step-00000007"]
    with start(words_of(settings_of(model, data, out), *short, "--no-merge")) as again:
        _, said = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, said
    assert "training goes on after step 7" in said and len(losses_of(out)) == 30


def test_out_of_memory_says_which_knobs_to_turn(model, tmp_path):
    rows = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5] * 512}] * 1000)
    settings = job_settings(model, rows, tmp_path / "run", validation=rows)
    words = [*words_of(settings, "--batch-size", "1000"), "--no-eval-at-start"]
    limit = 4 * 2**30

    def limit_memory():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    ended = subprocess.run(
        words, capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, check=False,
        env=clean_environment(), preexec_fn=limit_memory,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert "out of memory on cpu with a micro-batch of 1000 rows of up to 512 tokens" in last
    assert "--per-device-train-batch-size 500 --gradient-accumulation-steps 2" in last
    assert "--max-length 256" in last and "--gradient-checkpointing" in last


def test_a_terminal_sees_a_bar_that_moves(model, data, tmp_path):
    import pty

    settings = settings_of(model, data, tmp_path / "run")
    master, slave = pty.openpty()
    with subprocess.Popen(
        words_of(settings, "--no-merge", "--max-steps", "40"), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=slave, cwd=ROOT,
        env=clean_environment({"TERM": "xterm", "COLUMNS": "120"}),
    ) as process:  # fmt: skip
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "/40" in text and "tokens/s" in text and "validation after step 40" in text


def test_the_demo_shows_a_lower_loss_and_another_text(tmp_path):
    scripts = Path(sys.executable).parent
    demo = subprocess.run(
        [str(ROOT / "scripts" / "finetune_demo.sh")], capture_output=True, text=True, check=False,
        timeout=300,
        env=clean_environment(
            {"EPOCHS": "1", "SAVE_DIR": str(tmp_path / "run"),
             "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        ),
    )  # fmt: skip
    assert demo.returncode == 0, demo.stderr
    assert "the text has changed" in demo.stdout
    assert (tmp_path / "run" / "merged_model" / "model.safetensors").is_file()
