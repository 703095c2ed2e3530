"""`manager submit lora` on a real cluster: trained, told to wind up, queued again, resumed."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

TRAIN = ROOT / "examples" / "finetune" / "train.txt"
OPTIONS = (
    *("--train-path", TRAIN, "--save-dir", "run", "--save-steps", "5", "--lora-dropout", "0"),
    *("--no-merge", "--no-cuda", "--dtype", "float32"),
)


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see, to submit from."""
    folder = slurm.folder / request.node.name
    folder.mkdir()
    yield folder
    slurm.mend()


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss; of a step that was run twice, the last."""
    events = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return {it["step"]: it["loss"] for it in events if "loss" in it and "step" in it}


def steps_when(folder: Path, step: int, timeout_s: float = 240.0) -> None:
    """Wait until this checkpoint is there."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        found = [it.name for it in (folder / "run" / "checkpoints").glob("step-*")]
        if any(int(re.sub(r"\D", "", name)) >= step for name in found):
            return
        time.sleep(0.05)  # a folder tells nobody that it grew
    raise AssertionError(f"no checkpoint {step} in time")


def test_two_ranks_told_to_wind_up_go_on_in_the_next_job_with_the_losses_of_one_process(slurm, at):
    words = ("submit", "lora", *OPTIONS, "--max-steps", "120", "--tasks-per-node", "2")
    job = slurm.manager(
        *words, "--batch-size", "1", "--restarts", "1", check=True, cwd=at
    ).stdout.strip()
    steps_when(at, 10)
    slurm.sh("scancel", "--signal=TERM", job)  # as Slurm does before the time limit
    slurm.start_requeued(job)
    ended = slurm.wait(job)
    log = next((at / "comboio-jobs").glob("*.out")).read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "2 ranks by srun: node1 (2); each holds the whole model on cpu" in log
    assert (at / "run" / "lora_adapters" / "adapter_model.safetensors").is_file()
    (at / "alone").mkdir()
    words = ("finetune", "lora", *OPTIONS, "--max-steps", "120", "--batch-size", "2")
    slurm.manager(*words, check=True, cwd=at / "alone")
    assert losses(at) == pytest.approx(losses(at / "alone"), abs=1e-5)
    assert len(losses(at)) == 120


def test_a_script_by_hand_ends_in_a_sentence_when_the_data_is_bad(slurm, at):
    (at / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    job = slurm.submit(
        f"--export=ALL,COMBOIO_VENV={sys.prefix}",
        *("--output=log-%j", ROOT / "scripts" / "slurm" / "lora-cpu.sbatch"),
        *("--train_path", "bad.jsonl", "--save_dir", "run"),
        cwd=at,
    )
    ended = slurm.wait(job)
    log = (at / f"log-{job}").read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), log
    assert re.search(r"^manager: .*bad.jsonl:2", log, re.MULTILINE) and "Traceback" not in log


def test_what_a_job_has_trained_a_pipeline_job_serves_at_once(slurm, at):
    few = ("--max-steps", "8", "--batch-size", "2", "--learning-rate", "0.01")
    train = ("submit", "lora", *OPTIONS, *few, "--wait")
    slurm.manager(*train, check=True, cwd=at)
    (at / "prompts.txt").write_text("The nurse checks\n")
    batch = ("submit", "pipeline", "--nodes", "2", "--prompts", "prompts.txt", "--wait")
    texts = []
    for name, words in (("with", ("--adapter", "run/lora_adapters")), ("without", ())):
        output = at / f"{name}.jsonl"
        words = (*words, "--output", output, "--max-new-tokens", "16", "--dtype", "float32")
        slurm.manager(*batch, *words, check=True, cwd=at)
        texts.append(json.loads(output.read_text())["text"])
    assert texts[0] != texts[1], "the adapter changes the text"
