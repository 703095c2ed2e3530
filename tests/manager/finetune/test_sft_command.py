"""`manager finetune sft` before anything is launched: what it would start, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.jobs.events import Finished, Memory, Stepped
from engine.jobs.settings import JobSettings, OutputSettings, TrainingSettings
from engine.jobs.sft_job import SftJob, read_job
from engine.jobs.sft_messages import Failed, Happened, Hello, Said, decode, encode
from manager.finetune.sft_failures import Ended, explain
from manager.finetune.sft_launch import Launch, command, config_text, environment
from manager.finetune.sft_machines import Machines, find_machines
from proto.errors import Error, UsageError

SLURM = {"SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "2"}
TASK = {
    **SLURM, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "localhost,other",
}  # fmt: skip


def find(environ, **options):
    none = {"count": None, "rank": None, "address": None, "port": None}
    return find_machines(environ, **{**none, **options})


def launch(processes=2, machines=None, *, on_cpu=True, device="auto", interface=None):
    machines = machines or Machines()
    settings = JobSettings(
        method="sft", output=OutputSettings(save_dir="/run"),
        training=TrainingSettings(device=device),
    )  # fmt: skip
    return Launch(
        job=SftJob(
            settings=settings, num_processes=processes, on_cpu=on_cpu,
            mixed_precision="no" if on_cpu else "bf16", timeout_s=60,
        ),
        machines=machines, processes_here=processes // machines.count, rdzv_backend="c10d",
        threads=3, interface=interface, folder=Path("/run/launch"),
    )  # fmt: skip


def test_a_machine_is_alone_unless_it_is_told_otherwise():
    assert find({}).is_alone
    assert find({"SLURM_JOB_ID": "1"}).is_alone
    assert find(SLURM, count=1).is_alone
    told = find({}, count=4, rank=3, address="first", port=1234)
    assert told == Machines(count=4, rank=3, main_address="first", main_port=1234)
    assert find(TASK, count=4, rank=3, address="first", port=1234) == told


def test_a_task_of_a_job_finds_its_number_and_the_first_node(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho localhost; echo other\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_CONF", raising=False)
    port = 12_000 + 70 * 16 + 3
    assert find(TASK) == Machines(count=2, rank=1, main_address="localhost", main_port=port)
    assert find(TASK, port=99).main_port == 99


@pytest.mark.parametrize(
    ("environ", "options", "sentence"),
    [
        (SLURM, {}, "this job has 2 nodes, and only this one would train: start it as `srun"),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "8"}, {}, "srun started 8 tasks on 2 nodes"),
        ({**TASK, "SLURM_STEP_NUM_NODES": "x"}, {}, "SLURM_STEP_NUM_NODES is 'x'"),
        ({}, {"count": 2}, "needs --machine-rank and --main-process-ip and --main-process-port"),
        ({}, {"count": 2, "rank": 0, "address": "a"}, "needs --main-process-port as well"),
        ({}, {"count": 2, "rank": 2, "address": "a", "port": 1}, "must be from 0 to 1"),
        ({}, {"rank": 1}, "pass --num-machines as well"),
        ({}, {"count": 0}, "--num-machines 0 must be 1 or more"),
        ({}, {"port": 70000}, "--main-process-port 70000 must be from 0 to 65535"),
    ],
)
def test_machines_that_do_not_fit_together_are_refused(environ, options, sentence):
    with pytest.raises(UsageError) as refused:
        find(environ, **options)
    assert sentence in str(refused.value)


def test_one_process_is_launched_without_what_several_need():
    words = command(launch(1))
    assert "--multi_gpu" not in words and "--cpu" not in words
    assert words[-3:] == ["--module", "engine.jobs.sft_process", "/run/launch/job-machine0.json"]
    assert environment(launch(1), {})["ACCELERATE_USE_CPU"] == "true"
    assert "distributed_type: NO\n" in config_text(launch(1))


def test_several_machines_are_launched_with_everything_said():
    machines = Machines(count=2, rank=1, main_address="n1", main_port=4711)
    words = command(launch(8, machines, on_cpu=False))
    said = " ".join(words)
    for flag in ("--multi_gpu", "--num_machines 2", "--num_processes 8", "--machine_rank 1",
                 "--main_process_ip n1", "--main_process_port 4711", "--rdzv_backend c10d",
                 "--mixed_precision bf16", "--dynamo_backend no"):  # fmt: skip
        assert flag in said
    assert "--same_network" not in said, "c10d would look for the others on its own machine"


def test_the_processes_inherit_nothing_of_another_launcher_and_no_setting_they_need_is_lost():
    before = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "ACCELERATE_USE_FSDP": "true",
              "OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2", "HOME": "/home/x", "PYTHONPATH": "/p",
              "CUDA_VISIBLE_DEVICES": "4,6"}  # fmt: skip
    after = environment(launch(1, on_cpu=False, device="cuda:1", interface="ib0"), before)
    assert after["HOME"] == "/home/x" and after["PYTHONPATH"].endswith(":/p")
    assert after["CUDA_VISIBLE_DEVICES"] == "6"
    alone = environment(launch(1, on_cpu=False), {})
    assert alone["CUDA_VISIBLE_DEVICES"] == "0", "trl takes one GPU a process"
    assert environment(launch(2, on_cpu=False), before)["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert after["GLOO_SOCKET_IFNAME"] == after["NCCL_SOCKET_IFNAME"] == "ib0"
    assert after["OMP_NUM_THREADS"] == "3" and "ACCELERATE_USE_CPU" not in after
    lost = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "PMI_SIZE"}
    assert not lost & set(after)


def test_a_job_survives_its_file(tmp_path):
    job = launch(2).job
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job.to_json()))
    assert read_job(path) == job
    with pytest.raises(UsageError, match=r"none.json cannot be used"):
        read_job(tmp_path / "none.json")


def test_messages_survive_the_pipe_and_other_lines_are_none():
    memory = Memory(rss_bytes=1, peak_rss_bytes=2)
    step = Stepped(
        step=1, epoch=0.5, loss=float("inf"), learning_rate=1e-3, grad_norm=None, tokens=5,
        samples=2, seconds=0.1, tokens_per_s=50.0, samples_per_s=20.0, memory=memory,
    )  # fmt: skip
    for message in (
        Hello(rank=1, pid=2, host="h", log_file="/l"),
        Said(line="Olá\nzwei"),
        Happened(event=step),
        Happened(event=Finished(step=3, seconds=1.0, memory=memory)),
    ):
        line = encode(message)
        assert line.count("\n") == 1
        assert decode(line) == message
    for text in ("", "hello", "{}", '{"comboio": "Nothing"}', '{"comboio": "Said"}', '{"comboio'):
        assert decode(text) is None
    assert len(encode(Said(line="x" * 10_000))) < 4096


SUMMARY = """
Root Cause (first observed failure):
[0]:
  time      : 2025-01-01_00:00:00
  host      : n1
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 10)
Other Failures:
[1]:
  rank      : 1 (local_rank: 1)
  exitcode  : -11 (pid: 11)
"""
LOST = Failed(rank=0, sentence="RuntimeError: Connection closed", exit_code=1, lost_others=True)


@pytest.mark.parametrize(
    ("printed", "failures", "kind", "sentence"),
    [
        (SUMMARY, [LOST], Error, "process 1 of 2 on h1 was ended by SIGSEGV; its log is /log1,"),
        ("", [LOST], Error, "process 0 of 2 on h0 lost the connection to the others (RuntimeErr"),
        ("", [LOST, Failed(rank=1, sentence="bad.", exit_code=1)], Error,
         "process 1 of 2 on h1 failed: bad; its log is /log1."),
        ("", [Failed(rank=1, sentence="a.jsonl:2 is bad.", exit_code=2)] * 2, UsageError,
         "a.jsonl:2 is bad."),
        ("", [], Error, "the processes on this machine ended with code 1 and said nothing"),
    ],
)  # fmt: skip
def test_the_first_cause_is_what_is_said(printed, failures, kind, sentence):
    hellos = {it: Hello(rank=it, pid=it, host=f"h{it}", log_file=f"/log{it}") for it in (0, 1)}
    ended = Ended(
        launch=launch(2), exit_code=1, printed=printed, processes=hellos, failures=failures
    )
    error = explain(ended)
    assert type(error) is kind and sentence in str(error)


@pytest.mark.parametrize(
    ("printed", "sentence"),
    [
        ("ConnectionError: ..., but another process is utilizing it.", "port 5 of n1 is taken"),
        (
            "torch.distributed.DistNetworkError: The client socket has timed out",
            "machine 0 of 2 di",
        ),
        ("Traceback\nValueError: no such flag\n", "after starting 0 of 1 processes (ValueError: n"),
    ],
)
def test_a_launcher_that_starts_nothing_is_explained(printed, sentence):
    machines = Machines(count=2, rank=0, main_address="n1", main_port=5)
    ended = Ended(
        launch=launch(2, machines), exit_code=1, printed=printed, processes={}, failures=[]
    )
    assert sentence in str(explain(ended))


def test_a_single_process_is_named_without_a_number():
    hello = Hello(rank=0, pid=1, host="h", log_file="/log")
    died = "subprocess.CalledProcessError: Command '...' died with <Signals.SIGKILL: 9>."
    ended = Ended(launch=launch(1), exit_code=1, printed=died, processes={0: hello}, failures=[])
    assert str(explain(ended)).startswith("the training process was ended by SIGKILL (as the")
    failed = Failed(rank=0, sentence="out of memory", exit_code=1)
    ended = replace(ended, printed="", failures=[failed])
    assert str(explain(ended)) == "out of memory; its log is /log."


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--num-processes", 0), "--num-processes 0 must be from 1 to 4096."),
        (("--num-processes", 4, "--gpus-per-node", 2), "--num-processes 4 is not --gpus-per"),
        (("--mixed-precision", "bf16"), "--mixed-precision bf16 is for GPUs, and training runs on"),
        (("--quantize", "4bit"), "--quantize 4bit (QLoRA) needs a GPU, and training runs on the"),
        (("--interface", "nope0"), "--interface nope0: "),
        (("--machine-rank", 1), "pass --num-machines as well"),
        (("--num-machines", 3, "--machine-rank", 0, "--main-process-ip", "a",
          "--main-process-port", 1, "--num-processes", 4), "cannot be divided over 3 machines"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched_is_refused_in_one_line(call, tmp_path, words, sentence):
    save_dir = tmp_path / "run"
    answer = call(
        "finetune", "sft", "--train-path", "x", "--save-dir", save_dir, "--no-cuda", *words
    )
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert sentence in answer.err
    assert not save_dir.exists()


def test_a_folder_with_a_run_in_it_is_refused_before_anything_starts(call, tmp_path):
    (tmp_path / "launch").mkdir()  # of a launch that came to nothing: no run
    (tmp_path / "run.json").write_text("{}")
    answer = call("finetune", "sft", "--train-path", "x", "--save-dir", tmp_path, "--no-cuda")
    assert answer.code == 2 and "is not empty: pass --resume" in answer.err
