"""Jobs of several ranks for tests: `manager finetune axonn|lora`, against one plain process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from safetensors.torch import load_file

from engine.jobs.settings import JobSettings
from tests.support.finetuning import job_settings, losses_of, validation_losses_of
from tests.support.processes import ROOT, clean_environment

LOSS, WEIGHTS = 1e-5, 1e-3  # AdamW makes more of a rounding error than a loss does
STEP_ROWS = 4


def settings_of(model: Path, data: Path, save_dir: Path, *, steps: int = 6) -> JobSettings:
    """The job in one process, with all rows of a step at once."""
    return job_settings(
        model, data, save_dir, validation=data, max_steps=steps, learning_rate=1e-3,
        batch_size=STEP_ROWS, save_steps=7, lora={"dropout": 0.0}, eval_steps=3,
    )  # fmt: skip


def words_of(settings: JobSettings, num_ranks: int, *more: str, method: str = "axonn") -> list[str]:
    """The same job as one of so many ranks."""
    training = settings.training
    return [
        sys.executable, "-m", "manager", "finetune", method,
        "--base-model", str(settings.base_model), "--train-path", settings.data.train[0],
        "--val-path", settings.data.validation[0], "--save-dir", settings.output.save_dir,
        "--lora-r", "4", "--lora-alpha", "8", "--lora-dropout", "0",
        "--lr", str(training.learning_rate), "--max-steps", str(training.max_steps),
        "--batch-size", str(training.batch_size // num_ranks), "--eval-steps", "3",
        "--save-steps", "7", "--no-tensorboard", "--device", "cpu", *more,
    ]  # fmt: skip


def why_no_mpirun() -> str | None:
    """Why nothing can be started by mpirun here, or None."""
    return None if shutil.which("mpirun") else "needs mpirun (Open MPI); there is none here"


def mpirun(num_ranks: int, words: Sequence[str]) -> subprocess.Popen[str]:
    """Start it; whoever starts it waits for it (`with`)."""
    return subprocess.Popen(
        ["mpirun", "-q", "--oversubscribe", "-np", str(num_ranks), *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=mpi_environment(),
    )  # fmt: skip


def mpi_environment() -> dict[str, str]:
    """Open MPI asks twice whether root means it."""
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    ranks = ("SLURM_", "OMPI_COMM_", "PMIX_")
    env = {name: it for name, it in clean_environment().items() if not name.startswith(ranks)}
    return env | dict.fromkeys(allowed, "1")


def rank_process(save_dir: Path, variable: str, rank: int) -> psutil.Process:
    """One rank of a run, by what its launcher told it."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        line, told = process.info["cmdline"] or [], process.info["environ"] or {}
        is_python = bool(line) and os.path.basename(line[0]).startswith("python")
        if is_python and str(save_dir) in line and told.get(variable) == str(rank):
            return process
    raise AssertionError(f"no rank {rank} writes to {save_dir}")


def check_equal(found: Path, expected: Path) -> None:
    """Losses, adapters and merged models of two runs are the same but for rounding."""
    losses, plain = losses_of(found), losses_of(expected)
    assert len(losses) == len(plain)
    assert max(abs(one - other) for one, other in zip(losses, plain, strict=True)) < LOSS
    ours, theirs = validation_losses_of(found), validation_losses_of(expected)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert max(abs(it[1] - ot[1]) for it, ot in zip(ours, theirs, strict=True)) < LOSS
    for name in ("lora_adapters/adapter_model.safetensors", "merged_model/model.safetensors"):
        mine, reference = load_file(found / name), load_file(expected / name)
        assert set(mine) == set(reference)
        for key, tensor in mine.items():
            assert float((tensor - reference[key]).abs().max()) < WEIGHTS, key
