"""AxoNN under a real mpirun, in its test mode on CPUs: right, refused, killed, gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.finetuning import EXCHANGES, run, save_model, write_jsonl
from tests.support.processes import ROOT, clean_environment
from tests.support.ranks import (
    check_equal,
    mpirun,
    rank_process,
    settings_of,
    why_no_mpirun,
    words_of,
)

PATIENCE_S = 150
STEPS = 60

needs_mpirun = pytest.mark.skipif(why_no_mpirun() is not None, reason=str(why_no_mpirun()))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)


def finish(num_ranks, words):
    """Under mpirun to the end: (exit code, stdout, stderr)."""
    with mpirun(num_ranks, words) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert "Traceback" not in err
    return process.returncode, out, err


def alone(words):
    """Started by nothing: one rank."""
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S,
        cwd=ROOT, env=clean_environment(), check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@needs_mpirun
def test_shards_hold_compute_and_learn_what_the_whole_model_does(tmp_path):
    model = save_model(tmp_path / "tiny", intermediate_size=65)  # no two parts of its outputs
    probe = [sys.executable, "-m", "tests.support.axonn_probe", str(model)]
    code, out, err = finish(2, probe)
    assert code == 0, err
    found = json.loads(out)
    for axis, it in found.items():
        assert it["gathered"] == 0, axis
        assert it["logits"] < 1e-5, axis
        assert it["gradients"] < 1e-5, axis
        assert it["norms"][0] == pytest.approx(it["norms"][1], rel=1e-5), axis
        assert it["held"] < it["total"], axis
    assert found["row"]["whole"] and found["column"]["whole"] and not found["depth"]["whole"]
    assert found["depth"]["layers"] > found["row"]["layers"] > 0


@needs_mpirun
@pytest.mark.parametrize(
    ("num_ranks", "axis", "data_parallelism"), [(2, "row", "1"), (4, "depth", "2")]
)
def test_ranks_learn_what_one_plain_process_learns(
    model, data, tmp_path, num_ranks, axis, data_parallelism
):
    run(settings_of(model, data, tmp_path / "plain"))
    settings = settings_of(model, data, tmp_path / "ranks")
    code, out, err = finish(
        num_ranks,
        words_of(settings, num_ranks, "--tensor_parallelism", "2", "--parallelism-axis", axis,
                 "--data_parallelism", data_parallelism, "--json"),
    )  # fmt: skip
    assert code == 0, err
    check_equal(tmp_path / "ranks", tmp_path / "plain")
    assert json.loads(out)["merged_model"] == str(tmp_path / "ranks" / "merged_model")
    assert f"{num_ranks} ranks by mpirun" in err and "TEST MODE: AxoNN on CPUs over gloo" in err
    assert f"in 2 shards by {axis}" in (tmp_path / "ranks" / "train.log").read_text()
    logs = sorted(it.name for it in (tmp_path / "ranks" / "ranks").iterdir())
    assert logs == [f"rank-{rank:05d}.log" for rank in range(1, num_ranks)]


@needs_mpirun
def test_a_run_ended_then_bereft_of_a_rank_goes_on_to_the_same_losses(model, data, tmp_path):
    run(settings_of(model, data, tmp_path / "plain", steps=STEPS))
    settings = settings_of(model, data, tmp_path / "ranks", steps=STEPS)
    words = words_of(settings, 2, "--tensor_parallelism", "2", "--resume")
    code, said = end_when(settings, words, 10, None, signal.SIGUSR1)
    assert code == 128 + signal.SIGUSR1, said
    assert said.splitlines()[-1].startswith("manager: stopped after step ")
    code, said = end_when(settings, words, 30, 1, signal.SIGKILL)
    assert code != 0
    [line] = [it for it in said.splitlines() if it.startswith("manager: ")]
    assert "rank 1 on " in line and "died without a word" in line
    assert f"its log is {tmp_path / 'ranks' / 'ranks' / 'rank-00001.log'}" in line
    code, _, said = finish(2, words_of(settings, 2, "--tensor_parallelism", "1", "--resume"))
    assert code == 2
    assert "tensor 2 by depth x data 1, and this is tensor 1 by depth x data 2" in said
    code, _, said = finish(2, words)
    assert code == 0, said
    assert "training goes on after step " in said
    check_equal(tmp_path / "ranks", tmp_path / "plain")


def end_when(settings, words, step, rank, number):
    """Send a signal, to mpirun itself or to one rank, when a step is done: (exit code, stderr)."""
    save_dir = Path(settings.output.save_dir)
    with mpirun(2, words) as process:
        give_up_s = time.monotonic() + PATIENCE_S
        while f'"step": {step},' not in metrics(save_dir):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up_s
            time.sleep(0.005)  # a file tells nobody that it grew
        victim = process if rank is None else rank_process(
            save_dir, "OMPI_COMM_WORLD_RANK", rank
        )  # fmt: skip
        victim.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE_S)
        return process.returncode, said


def metrics(save_dir):
    try:
        return (save_dir / "metrics.jsonl").read_text()
    except OSError:
        return ""


@needs_mpirun
def test_a_product_that_is_not_the_ranks_is_said_once_with_the_numbers(model, data, tmp_path):
    settings = settings_of(model, data, tmp_path / "run")
    words = words_of(settings, 2, "--tensor_parallelism", "2", "--data_parallelism", "4")
    code, _, err = finish(2, words)
    assert code == 2
    [line] = [it for it in err.splitlines() if it.startswith("manager: ")]
    assert "--tensor-parallelism 2 x --data-parallelism 4 takes 8 ranks, and 2 ranks were" in line
    assert not (tmp_path / "run").exists()


def test_a_model_of_which_nothing_would_be_sharded_is_refused(data, tmp_path):
    settings = settings_of(save_model(tmp_path / "model", "gpt2"), data, tmp_path / "run")
    code, line = alone(words_of(settings, 1))
    assert code == 2
    assert "AxoNN would shard nothing of GPT2LMHeadModel" in line and "Conv1D" in line
    assert not [it for it in (tmp_path / "run").iterdir() if it.name != ".lock"]


def test_without_a_gpu_the_test_mode_has_to_be_asked_for(model, data, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    settings = settings_of(model, data, tmp_path / "run")
    code, line = alone([*words_of(settings, 1), "--device", "auto"])
    assert code == 2
    assert "AxoNN computes on GPUs" in line and "--device cpu is a test mode" in line
    settings = replace(settings, base_model=str(model))
    code, line = alone([*words_of(settings, 1), "--tensor-parallelism", "2"])
    assert code == 2 and "1 rank was started by nothing that starts several" in line
