"""`manager finetune lora` in several processes: right, bereft of one, gone on with, refused."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from tests.support.finetuning import EXCHANGES, metrics_of, run, save_model, write_jsonl
from tests.support.processes import ROOT, clean_environment
from tests.support.ranks import check_equal, settings_of, words_of

PATIENCE_S = 150
STEPS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)


def start(words, **environ):
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=clean_environment(environ),
    )  # fmt: skip


def test_ranks_bereft_of_one_go_on_to_the_losses_of_one_process(model, data, tmp_path):
    run(settings_of(model, data, tmp_path / "plain", steps=STEPS))
    settings = settings_of(model, data, tmp_path / "ranks", steps=STEPS)
    words = words_of(settings, 2, "--processes", "2", "--resume", method="lora")
    metrics = tmp_path / "ranks" / "metrics.jsonl"
    with start(words) as process:
        give_up_s = time.monotonic() + PATIENCE_S
        while not (metrics.exists() and '"step": 8,' in metrics.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up_s
            time.sleep(0.005)  # a file tells nobody that it grew
        [other] = psutil.Process(process.pid).children()
        other.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    [line] = [it for it in said.splitlines() if it.startswith("manager: ")]
    assert "rank 1 on " in line and "died without a word" in line
    assert f"its log is {tmp_path / 'ranks' / 'ranks' / 'rank-00001.log'}" in line
    with start(words) as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert "2 ranks by this command: " in said and "training goes on after step " in said
    check_equal(tmp_path / "ranks", tmp_path / "plain")
    assert metrics_of(tmp_path / "ranks")[0]["processes"] == 2


def test_fewer_ranks_than_asked_for_are_refused(model, data, tmp_path):
    settings = settings_of(model, data, tmp_path / "run")
    words = words_of(settings, 1, "--processes", "4", method="lora")
    with start(words, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0") as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert said == (
        "manager: --processes 4, and torchrun started 2: leave the option out, or start as many.\n"
    )
    assert not (tmp_path / "run").exists()
