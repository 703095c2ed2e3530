"""`manager finetune sft` on two nodes of a real cluster: one run, whoever meets whom and how."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.finetuning import (
    EXCHANGES,
    job_settings,
    losses_of,
    metrics_of,
    run,
    save_model,
    validation_losses_of,
    write_jsonl,
)
from tests.support.processes import ROOT
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

SCRIPT = ROOT / "scripts" / "slurm" / "sft.sbatch"
STEPS = 6


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see, with a model and data in it."""
    folder = slurm.folder / re.sub(r"\W+", "-", request.node.name)
    folder.mkdir()
    save_model(folder / "tiny")
    write_jsonl(folder / "exchanges.jsonl", EXCHANGES)
    yield folder
    slurm.mend()


def submit(slurm: SlurmCluster, at: Path, *words: object) -> int:
    return slurm.submit(
        *(f"--export=ALL,COMBOIO_VENV={sys.prefix}", "--nodes=2", "--output=sft-%j.out", SCRIPT),
        *("--base-model", "tiny", "--train-path", "exchanges.jsonl", "--save-dir", "run"),
        *("--val-path", "exchanges.jsonl", "--no-cuda", "--no-tensorboard", "--no-merge"),
        *("--lr", "1e-2", "--lora-dropout", "0", "--lora-r", "4", "--lora-alpha", "8", *words),
        cwd=at,
    )


def log_of(at: Path, job: int) -> str:
    return (at / f"sft-{job}.out").read_text()


def alone(at: Path) -> Path:
    """The same rows a step in one process, here."""
    data = at / "exchanges.jsonl"
    settings = job_settings(
        at / "tiny", data, at / "alone", validation=data, max_steps=STEPS, batch_size=4,
        lora={"dropout": 0.0}, output={"merge": False},
    )  # fmt: skip
    run(settings)
    return at / "alone"


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_nodes_learn_what_one_process_learns(slurm, at, backend):
    job = submit(slurm, at, "--max-steps", STEPS, "--batch-size", 2, "--rdzv-backend", backend)
    state = slurm.wait(job)["JobState"]
    assert state == "COMPLETED", log_of(at, job)
    trained, expected = at / "run", alone(at)
    assert losses_of(trained) == pytest.approx(losses_of(expected), abs=1e-5)
    assert len(losses_of(trained)) == STEPS
    looks = validation_losses_of(trained)
    assert looks == [
        (step, pytest.approx(loss, abs=1e-5)) for step, loss in validation_losses_of(expected)
    ]
    assert metrics_of(trained)[0]["processes"] == 2
    log = log_of(at, job)
    assert log.count(f"lora_adapters {trained}/lora_adapters") == 1, (
        "the first process alone says it"
    )
    assert (trained / "lora_adapters" / "adapter_model.safetensors").is_file()
    told = [(trained / "launch" / f"accelerate-machine{it}.yaml").read_text() for it in (0, 1)]
    for rank, text in enumerate(told):
        assert f"machine_rank: {rank}\n" in text and "main_process_ip: node1\n" in text
        assert "num_processes: 2\n" in text and f"rdzv_backend: {backend}\n" in text
    ports = [re.findall(r"main_process_port: (\d+)\n", text) for text in told]
    assert ports[0] == ports[1] == [str(12_000 + job * 16 % 16_000)]


def test_a_process_that_is_killed_is_named_with_its_node_and_its_log(slurm, at):
    job = submit(slurm, at, "--max-steps", 100000, "--batch-size", 2, "--save-steps", 5)
    victim = process_when(at, rank=1)
    wait_for_steps(at / "run", 10)
    os.kill(victim, signal.SIGKILL)
    assert slurm.wait(job)["JobState"] == "FAILED"
    log = log_of(at, job)
    assert "process 1 of 2 on node" in log and "was ended by SIGKILL" in log, log
    assert f"its log is {at}/run/launch/process1.log" in log and "Traceback" not in log
    give_up_s = time.monotonic() + 20
    while left := processes(at):
        assert time.monotonic() < give_up_s, left
        time.sleep(0.1)


def test_a_job_whose_time_is_up_leaves_a_checkpoint(slurm, at):
    job = submit(slurm, at, "--max-steps", 100000, "--batch-size", 2, "--save-steps", 100000)
    wait_for_steps(at / "run", 5)
    slurm.sh("scancel", "--signal=TERM", job)
    assert slurm.wait(job)["JobState"] == "FAILED"
    log = log_of(at, job)
    found = re.search(r"stopped after step (\d+) of 100000: (\S+) is whole", log)
    assert found, log
    checkpoints = [it.name for it in (at / "run" / "checkpoints").iterdir()]
    assert checkpoints == [f"step-{int(found[1]):08d}"]
    assert not processes(at)


def wait_for_steps(run: Path, step: int, timeout_s: float = 240.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    path = run / "metrics.jsonl"
    while not (path.exists() and re.search(rf'"step": {step},', path.read_text())):
        assert time.monotonic() < give_up_s, f"{run} does not get to step {step}"
        time.sleep(0.05)  # a file tells nobody that it grew


def processes(at: Path) -> dict[int, int]:
    """Rank to pid of what was launched below a folder."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "engine.jobs.sft_process" in words and any(str(at) in word for word in words):
            if "accelerate.commands.accelerate_cli" in words:
                continue
            try:
                found[int(process.environ().get("RANK", "0"))] = process.pid
            except psutil.Error:
                continue
    return found


def process_when(at: Path, rank: int, timeout_s: float = 240.0) -> int:
    give_up_s = time.monotonic() + timeout_s
    while rank not in (found := processes(at)):
        assert time.monotonic() < give_up_s, f"no process {rank}: {found}"
        time.sleep(0.05)
    return found[rank]
