"""`manager submit` without a cluster: what would be submitted, and what is refused before."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from manager.cli import main
from manager.slurm.scripts import job_environment
from tests.support.processes import ROOT

SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, with prompts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("def add(a, b):\n")
    return tmp_path


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


BATCH = ("submit", "pipeline", "--nodes", "3", "--prompts", "prompts.txt", "--output", "out.jsonl")


def command_of(out: str) -> tuple[dict[str, str], list[str]]:
    """(variables, words) of the last line of a dry run."""
    words = shlex.split(out.splitlines()[-1])
    start = words.index("sbatch")
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


def test_a_dry_run_shows_the_script_and_the_exact_command(at, capsys):
    code, out, err = run(capsys, *BATCH, "--max_new_tokens", "5", "--dry-run", "-p", "gpu")
    assert (code, err) == (0, "")
    script = ROOT / "scripts" / "slurm" / "pipeline.sbatch"
    assert script.read_text() in out
    variables, words = command_of(out)
    assert words[:2] == ["sbatch", "--parsable"]
    own = words.index(str(script))
    assert {"--nodes=3", "--ntasks-per-node=1", "--partition=gpu"} <= set(words[:own])
    assert set(words[own + 1 :]) == {
        f"--prompts={at}/prompts.txt",
        f"--output={at}/out.jsonl",
        "--max-new-tokens=5",
    }
    assert variables["COMBOIO_JOBS"] == str(at / "comboio-jobs")
    assert not (at / "comboio-jobs").exists(), "a dry run leaves nothing behind"


def test_everything_that_was_set_reaches_the_job(at, capsys):
    options = {
        "--model": str(ROOT / "engine" / "demo"),
        "--metrics": str(at / "m.json"),
        "--batch-size": "3",
        "--iters": "2",
        "--temperature": "0.5",
        "--seed": "7",
        "--system": "-be brief",
        "--dtype": "float32",
        "--kv-memory": "64MiB",
        "--threads": "2",
        "--stage-to": "/tmp/stage",
        "--interface": "ib0",
        "--recovery-timeout": "9.0",
    }
    typed = [f"{name}={value}" for name, value in options.items()]
    typed += ["--stop=a", "--stop=--b", "--chat", "--overwrite"]
    code, out, _ = run(capsys, *BATCH, *typed, "--dry-run")
    assert code == 0
    _, words = command_of(out)
    assert set(typed) <= set(words)


def test_a_setting_counts_like_an_option(at, capsys, monkeypatch):
    (at / "comboio.toml").write_text(
        '[manager]\nmax-new-tokens = 9\n[slurm]\naccount = "bio42"\ntime = "2:00:00"\n'
    )
    monkeypatch.setenv("COMBOIO_BATCH_SIZE", "2")
    code, out, _ = run(capsys, *BATCH, "--dry-run")
    assert code == 0
    assert {"--max-new-tokens=9", "--batch-size=2", "--account=bio42", "--time=2:00:00"} <= set(
        command_of(out)[1]
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "3"], "say what the job is for"),
        (["--nodes", "3", "--prompts", "prompts.txt"], "needs --output"),
        (["--nodes", "3", "--prompt", "x", "--prompts", "prompts.txt"], "say what the job is for"),
        (["--nodes", "3", "--prompt", "x", "--output", "o.jsonl"], "--output belongs to --prompts"),
        (["--nodes", "3", "--prompt", ""], "--prompt is empty"),
        (["--nodes", "3", "--serve", "--prompt", "x"], "say what the job is for"),
        (["--nodes", "3", "--serve", "--output", "o.jsonl"], "--output belongs to --prompts"),
        (["--nodes", "3", "--prompt", "x", "--port", "8000"], "--port belongs to --serve"),
        (["--nodes", "0", "--prompt", "x"], "0"),
        ([*BATCH[2:], "--output", "none/out.jsonl"], "no folder none"),
        ([*BATCH[2:], "--prompts", "none.txt"], "none.txt: there is no such file"),
        ([*BATCH[2:], "--metrics", "."], "--metrics . is a folder"),
        ([*BATCH[2:], "--model", "./none"], "--model ./none: there is no such folder"),
        ([*BATCH[2:], "--model", "."], "no config.json"),
        ([*BATCH[2:], "--profile", "none"], "--profile none"),
        ([*BATCH[2:], "--sbatch-flag", "x"], "no flag"),
    ],
)
def test_what_would_fail_in_the_job_is_refused_before(at, capsys, words, sentence):
    code, out, err = run(capsys, "submit", "pipeline", *words, "--dry-run")
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and sentence in err


LORA = ("submit", "lora", "--train-path", "prompts.txt", "--save-dir", "run")


def test_fine_tuning_is_submitted_as_it_is_run_here(at, capsys):
    typed = ["--epochs=2", "--lr=0.001", "--no-merge", "--lora_r=4", "--gradient-checkpointing"]
    code, out, err = run(capsys, *LORA, *typed, "--dry-run", "--cpus-per-task", "8")
    assert (code, err) == (0, "")
    _, words = command_of(out)
    script = words.index(str(ROOT / "scripts" / "slurm" / "lora.sbatch"))
    assert "--cpus-per-task=8" in words[:script]
    own = {"--train-path=prompts.txt", "--save-dir=run", "--epochs=2.0", "--no-merge"}
    assert own | {"--lora-r=4", "--gradient-checkpointing"} <= set(words[script + 1 :])
    assert any(it.endswith("=0.001") for it in words[script + 1 :])


def test_without_a_gpu_another_script_is_submitted(at, capsys):
    code, out, _ = run(capsys, *LORA, "--no_cuda", "--dry-run")
    assert code == 0
    assert str(ROOT / "scripts" / "slurm" / "lora-cpu.sbatch") in command_of(out)[1]


@pytest.mark.parametrize("typed", [("--gpus-per-node", "4"), ("--gres", "gpu:4,shard:1")])
def test_lora_takes_one_task_a_gpu(at, capsys, typed):
    code, out, _ = run(capsys, *LORA, "--nodes", "2", *typed, "--dry-run")
    assert code == 0
    _, words = command_of(out)
    script = words.index(str(ROOT / "scripts" / "slurm" / "lora.sbatch"))
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(words[:script])
    assert not any("nodes" in it or "tasks" in it for it in words[script + 1 :])


def test_sft_takes_one_task_a_node(at, capsys):
    typed = ["--nodes", "2", "--gpus-per-node", "a100:4", "--rdzv-backend", "c10d"]
    code, out, _ = run(capsys, "submit", "sft", *LORA[2:], *typed, "--dry-run")
    assert code == 0
    _, words = command_of(out)
    script = words.index(str(ROOT / "scripts" / "slurm" / "sft.sbatch"))
    flags = {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=a100:4"}
    assert flags <= set(words[:script])
    assert "--rdzv-backend=c10d" in words[script:]
    assert not any("gpus-per-node" in it for it in words[script + 1 :])


def test_axonn_takes_one_task_a_gpu_and_reckons_before_it_is_submitted(at, capsys):
    axonn = ("submit", "axonn", *LORA[2:], "--nodes", "2", "--gpus-per-node", "4", "--dry-run")
    parallel = ("--tensor_parallelism", "2", "--data_parallelism")
    code, out, _ = run(capsys, *axonn, *parallel, "4")
    assert code == 0
    _, words = command_of(out)
    script = words.index(str(ROOT / "scripts" / "slurm" / "axonn.sbatch"))
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(words[:script])
    assert {"--tensor-parallelism=2", "--data-parallelism=4"} <= set(words[script:])
    code, _, err = run(capsys, *axonn, *parallel, "3")
    assert code == 2 and all(number in err for number in ("2", "3", "8")), err


def test_a_folder_with_an_earlier_run_is_refused_before_the_job(at, capsys):
    (at / "run").mkdir()
    (at / "run" / "run.json").write_text("{}")
    code, _, err = run(capsys, *LORA, "--dry-run")
    assert code == 2 and err.count("\n") == 1 and "run" in err


def test_results_that_are_there_are_not_replaced_by_accident(at, capsys):
    (at / "out.jsonl").write_text("{}\n")
    code, _, err = run(capsys, *BATCH, "--dry-run")
    assert code == 2 and "is there already" in err
    assert run(capsys, *BATCH, "--overwrite", "--dry-run")[0] == 0


def test_without_slurm_it_is_one_sentence(at, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(at))
    code, out, err = run(capsys, *BATCH)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "sbatch is not on this machine's PATH" in err


def test_a_jobs_folder_that_cannot_be_made_is_one_sentence(at, capsys):
    (at / "file").write_text("")
    code, _, err = run(capsys, *BATCH, "--jobs-folder", str(at / "file" / "jobs"))
    assert code == 2 and err.count("\n") == 1 and "cannot make the jobs' folder" in err


def test_a_job_inherits_no_secret(tmp_path):
    environ = {
        "HOME": "/h",
        "SLURM_CONF": "/c",
        "SLURM_JOB_ID": "1",
        "HF_TOKEN": "hf_x",
        "OPENAI_API_KEY": "sk",
        "AWS_SECRET_ACCESS_KEY": "k",
        "PGPASSWORD": "p",
        "SSH_PRIVATE_KEY": "k",
        "MY_TOKEN_FILE": "/path/to/token",
    }
    kept = job_environment(environ, tmp_path)
    token = Path(kept.pop("HF_TOKEN_PATH"))
    assert kept == {"HOME": "/h", "SLURM_CONF": "/c", "MY_TOKEN_FILE": "/path/to/token"}
    assert token.read_text() == "hf_x"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    os.chmod(token, 0o644)
    job_environment(environ, tmp_path)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600, "one that was there is closed again"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda it: it.name)
def test_every_script_passes_shellcheck(script):
    checked = subprocess.run(
        ["shellcheck", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_all_scripts_enter_their_environment_alike():
    parts = {
        script.name: script.read_text().split("# --- the environment")[1].split("\n# ---")[0]
        for script in SCRIPTS
    }
    assert len(set(parts.values())) == 1, sorted(parts)


def test_no_script_knows_a_site():
    for script in SCRIPTS:
        flags = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        named = {line.split("=")[0].split("--")[1] for line in flags if "--" in line}
        assert named.isdisjoint({"partition", "account", "qos", "gres", "constraint", "mem"})
