"""Events become lines, a file that survives a power cut, and figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.jobs.events import Memory, Started, Stepped, Validated
from engine.jobs.report import summarize, write_curve
from engine.jobs.run_folder import RunFolder
from engine.jobs.run_log import LineWriter, RunLog, describe_memory, read_metrics
from engine.jobs.stopping import Stopped, StopRequest, stop_request
from proto.errors import Error
from tests.support.processes import ROOT, clean_environment

MEMORY = Memory(rss_bytes=5 * 10**8, peak_rss_bytes=6 * 10**8)


def stepped(step, loss=1.0):
    return Stepped(
        step=step, epoch=step / 10, loss=loss, learning_rate=1e-3, grad_norm=0.5, tokens=100,
        samples=4, seconds=0.5, tokens_per_s=200.0, samples_per_s=8.0, memory=MEMORY,
    )  # fmt: skip


def log_of(folder, **settings):
    defaults = {"log_file": None, "log_steps": 10, "memory_steps": 5, "with_tensorboard": False,
                "resumed_step": None}  # fmt: skip
    return RunLog(RunFolder(folder), **{**defaults, **settings})


def test_lines_come_every_so_many_steps_and_at_both_ends():
    writer = LineWriter(10, 4)
    started = Started(
        step=0, total_steps=22, steps_per_epoch=11, rows=44, step_rows=4, processes=1, trainable=10,
        weights=1000, device="cpu", dtype="float32", is_resumed=False,
    )  # fmt: skip
    (line,) = writer.of(started)
    assert "44 rows, 22 steps of 4 rows" in line and "10 of 1,000 weights learn (1 %)" in line
    lines = [line for step in range(1, 23) for line in writer.of(stepped(step))]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(",")[0] for line in steps] == [f"step {it}/22" for it in (1, 10, 20, 22)]
    memory = [line for line in lines if line.startswith("[memory]")]
    assert [line.split(":")[0] for line in memory] == [
        f"[memory] step {it}" for it in (1, 4, 8, 12, 16, 20, 22)
    ]


def test_the_memory_line_tells_of_a_gpu_where_there_is_one():
    assert describe_memory(7, MEMORY) == ("[memory] step 7: CPU 500.0 MB (peak 600.0 MB), no GPU")
    gpu = Memory(
        rss_bytes=10**6, peak_rss_bytes=10**6, gpu_bytes=2 * 10**9, peak_gpu_bytes=3 * 10**9,
        gpu_reserved_bytes=4 * 10**9, gpu_busy=0.93,
    )  # fmt: skip
    assert describe_memory(7, gpu).endswith(
        "GPU 2000.0 MB allocated (peak 3000.0 MB), 4000.0 MB reserved, GPU 93 % busy"
    )


def test_a_line_is_in_the_file_when_the_event_is_over(tmp_path):
    with log_of(tmp_path, log_file=tmp_path / "deep" / "my.log") as log:
        log(stepped(5))
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
        assert "[memory] step 5" in (tmp_path / "deep" / "my.log").read_text()


def test_a_run_that_goes_on_forgets_later_steps_and_a_torn_line(tmp_path):
    with log_of(tmp_path) as log:
        for step in range(1, 9):
            log(stepped(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "tra')
    with log_of(tmp_path, resumed_step=6) as log:
        log(stepped(7, loss=0.5))
    assert [(it["step"], it["loss"]) for it in read_metrics(path)][-2:] == [(6, 1.0), (7, 0.5)]
    with log_of(tmp_path):
        pass
    assert read_metrics(path) == []


def test_a_log_file_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match=r"file/my\.log cannot be written: "):
        log_of(tmp_path, log_file=tmp_path / "file" / "my.log")


def test_a_full_disk_is_said_once_though_closing_fails_as_well(tmp_path):
    with pytest.raises(Error, match=r"^/dev/full cannot be written, the disk is full"):
        with log_of(tmp_path, log_file=Path("/dev/full"), memory_steps=1) as log:
            log(stepped(1))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_figures_are_sums_and_means_over_all_steps(tmp_path):
    with log_of(tmp_path) as log:
        for step in range(1, 61):
            log(stepped(step, loss=10 / step))
        for step, loss in ((0, 3.0), (30, 1.0), (60, 2.0)):
            log(Validated(step=step, loss=loss, perplexity=1.0, tokens=5, seconds=0.1))
    figures = summarize(RunFolder(tmp_path))
    assert (figures["first_loss"], figures["last_loss"]) == (10.0, 10 / 60)
    assert (figures["best_validation_loss"], figures["best_validation_step"]) == (1.0, 30)
    assert figures["tokens"] == 6000 and figures["tokens_per_s"] == 200.0
    assert figures["peak_rss_bytes"] == 6 * 10**8 and figures["peak_gpu_bytes"] is None
    assert write_curve(RunFolder(tmp_path))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_signal_is_remembered():
    with stop_request() as stop:
        stop.leave_if_made("anything")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(Stopped, match="stopped before the data was read"):
            stop.leave_if_made("the data was read")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert StopRequest().is_made is False


def test_the_second_signal_ends_the_process():
    script = (
        "import time\nfrom engine.jobs.stopping import stop_request\n"
        "with stop_request() as stop:\n    print('on', flush=True)\n"
        "    while not stop.is_made:\n        time.sleep(0.01)\n"
        "    print('heard', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=clean_environment(),
    )  # fmt: skip
    assert process.stdout is not None
    started_s = time.monotonic()
    for line in ("on\n", "heard\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    process.stdout.close()
    assert time.monotonic() - started_s < 60
