"""`manager submit pipeline` on a real cluster: three nodes, each with an address of its own."""

from __future__ import annotations

import json
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from engine.checkpoint_source import DEMO_MODEL
from tests.support.processes import ROOT
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

PROMPTS = [f"def add_{number}(a, b):" for number in range(6)]
MANY = [f"The module number {number} provides" for number in range(60)]
NEW_TOKENS = 12


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see, to submit from."""
    folder = slurm.folder / re.sub(r"\W+", "-", request.node.name)
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "many.txt").write_text("\n".join(MANY) + "\n")
    yield folder
    slurm.mend()


@pytest.fixture(scope="module")
def expected(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str], int], list[str]]:
    """What one worker alone makes of prompts."""
    made: dict[tuple[str, ...], list[str]] = {}
    folder = tmp_path_factory.mktemp("expected")

    def texts(prompts: list[str], new_tokens: int) -> list[str]:
        key = (*prompts, str(new_tokens))
        if key not in made:
            (folder / "p.txt").write_text("\n".join(prompts) + "\n")
            answer = slurm.manager(
                *("batch", "--prompts", folder / "p.txt", "--spawn", "1"),
                *("--max-new-tokens", new_tokens),
                check=True,
                env=exact_model(slurm),
            )
            made[key] = [json.loads(line)["text"] for line in answer.stdout.splitlines()]
        return made[key]

    return texts


def submit(slurm: SlurmCluster, at: Path, *words: str, env: dict[str, str] | None = None) -> str:
    env = {**exact_model(slurm), **(env or {})}
    answer = slurm.manager("submit", "pipeline", *words, check=True, cwd=at, env=env)
    return answer.stdout.strip()


def exact_model(slurm: SlurmCluster) -> dict[str, str]:
    """The setting for the demo model in float32: with fewer bits, a text's last ones depend on how
    many others are beside it."""
    folder = slurm.folder / "demo"
    if not folder.exists():
        shutil.copytree(DEMO_MODEL, folder)
        weights = load_file(folder / "model.safetensors")
        exact = {name: it.float() for name, it in weights.items()}
        save_file(exact, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return {"COMBOIO_MODEL": str(folder)}


def log_of(at: Path, job: str) -> str:
    return next((at / "comboio-jobs").glob(f"*-{job}.out")).read_text()


def log_when(at: Path, job: str, words: str, timeout_s: float = 240.0) -> str:
    """The log, once it has these words."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if any(words in path.read_text() for path in (at / "comboio-jobs").glob(f"*-{job}.out")):
            return log_of(at, job)
        time.sleep(0.1)  # a file tells nobody that it grew
    raise AssertionError(f"no {words!r} in time:\n{log_of(at, job)}")


def rows_when(path: Path, count: int, timeout_s: float = 240.0) -> None:
    """Wait until so many rows are kept."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        # The first line says what made the others.
        if path.exists() and path.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} has no {count} rows in time")


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def processes(*words: str) -> list[psutil.Process]:
    """Those whose command line has all of these words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if all(word in line for word in words):
            found.append(process)
    return found


def test_a_batch_over_three_nodes_ends_by_itself_with_every_result(slurm, at, expected):
    job = submit(
        *(slurm, at, "--nodes", "3", "--prompts", "prompts.txt", "--output", "out.jsonl"),
        *("--max-new-tokens", str(NEW_TOKENS), "--metrics", "metrics.json"),
    )
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    assert texts_of(at / "out.jsonl") == expected(PROMPTS, NEW_TOKENS)
    log = log_of(at, job)
    assert "ready: a token went through 3 sections" in log
    rows = re.findall(r"^(node\d) +(\d) +(\d+:\d+) +\S+ \S+ +(\d+) ", log, re.MULTILINE)
    assert [row[:2] for row in rows] == [("node1", "0"), ("node2", "1"), ("node3", "2")]
    assert all(int(row[3]) >= NEW_TOKENS for row in rows), "every node ran the steps"
    workers = json.loads((at / "metrics.json").read_text())["workers"]
    assert [it["address"].split(":")[0][-2:] for it in workers] == [".1", ".2", ".3"]


def test_the_script_by_hand_with_two_tasks_a_node_each_on_its_own_gpu(slurm, at):
    job = slurm.submit(
        f"--export=ALL,COMBOIO_VENV={sys.prefix}",
        *("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--output=hand-%j.out"),
        *(ROOT / "scripts" / "slurm" / "pipeline.sbatch", "--prompt", "import os", "--seed", "1"),
        *("--max-new-tokens", "8", "--interface", "eth0"),
        cwd=at,
    )
    ended = slurm.wait(job)
    log = (at / f"hand-{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED", log
    sections = re.findall(r"^(node\d) +(\d) ", log, re.MULTILINE)
    assert sections == [("node1", "0"), ("node1", "1"), ("node2", "2"), ("node2", "3")]
    gpus = re.findall(r"section (\d) on node\d: takes GPU (\d)", log)
    assert sorted(gpus) == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    assert (at / "comboio-jobs" / str(job)).is_dir(), "its folder is where it was submitted"


def test_a_worker_that_dies_comes_back_and_nothing_is_lost_or_shown(slurm, at, expected):
    secrets = {"HF_TOKEN": "hf_not_for_everybody"}
    job = submit(
        *(slurm, at, "--nodes", "2", "--prompts", "many.txt", "--output", "out.jsonl"),
        *("--max-new-tokens", "32"),
        env=secrets,
    )
    rows_when(at / "out.jsonl.partial", 3)
    folder = at / "comboio-jobs" / job
    secret = (folder / "secret").read_text()
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    (worker,) = processes("-m worker", "--index 1", str(folder))
    for process in [worker, *processes(str(folder))]:
        told = " ".join([*process.cmdline(), *process.environ().values()])
        assert secret not in told and secrets["HF_TOKEN"] not in told
    worker.kill()
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    log = log_of(at, job)
    assert "section 1 on node2: its worker ended" in log and "is started anew" in log
    assert secret not in log and secrets["HF_TOKEN"] not in log
    assert texts_of(at / "out.jsonl") == expected(MANY, 32)


def test_a_section_that_does_not_come_back_ends_the_job_in_a_sentence(slurm, at):
    job = submit(
        *(slurm, at, "--nodes", "2", "--prompts", "many.txt", "--output", "out.jsonl"),
        *("--max-new-tokens", "32", "--recovery-timeout", "1"),
    )
    rows_when(at / "out.jsonl.partial", 1)
    folder = str(at / "comboio-jobs" / job)
    (worker,) = processes("-m worker", "--index 1", folder)
    worker.parent().kill()  # the task itself, as when a node runs out of memory
    ended = slurm.wait(job)
    assert ended["JobState"] == "FAILED"
    log = log_of(at, job)
    assert re.search(
        r"^manager: .*section 1 on node2 .*not.* back within 1 s", log, re.MULTILINE
    ), log
    assert "Traceback" not in log
    assert not processes("-m worker", folder)


def test_a_worker_that_cannot_start_ends_the_job_in_its_own_words(slurm, at):
    words = ("--nodes", "2", "--prompt", "x", "--model", "nobody/nothing", "--wait")
    answer = slurm.manager("submit", "pipeline", *words, cwd=at)
    assert answer.returncode == 1, answer
    job = answer.stdout.split()[0]
    sentence = r"manager: section \d on node\d: .*nobody/nothing"
    assert re.search(rf"^{sentence}", log_of(at, job), re.MULTILINE), log_of(at, job)
    assert re.search(sentence, answer.stderr.splitlines()[-1]), "whoever waits is told as well"
    assert "Traceback" not in log_of(at, job)


def test_a_job_told_to_wind_up_keeps_what_is_done_and_the_next_run_goes_on(slurm, at, expected):
    job = submit(
        *(slurm, at, "--nodes", "2", "--prompts", "many.txt", "--output", "out.jsonl"),
        *("--max-new-tokens", "32", "--restarts", "1"),
    )
    rows_when(at / "out.jsonl.partial", 1)
    slurm.sh("scancel", "--signal=TERM", job)  # as Slurm does a minute before the time limit
    log = log_when(at, job, "goes back into the queue")
    assert re.search(r"Slurm told the job to end: [1-9]\d* of 60 rows are kept", log), log
    slurm.wait(job, ("PENDING",))
    slurm.start_requeued(job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log_of(at, job)
    assert re.search(r"going on: [1-9]\d* of 60 rows are done already", log_of(at, job))
    assert texts_of(at / "out.jsonl") == expected(MANY, 32)


def test_before_the_time_limit_the_job_winds_up_by_itself(slurm, at):
    (at / "endless.txt").write_text("Once upon a time\n" * 20_000)
    job = submit(
        *(slurm, at, "--nodes", "1", "--prompts", "endless.txt", "--output", "out.jsonl"),
    )
    rows_when(at / "out.jsonl.partial", 1)
    # The script asks for SIGTERM a minute before the limit; Slurm looks every half minute.
    slurm.sh("scontrol", "update", f"jobid={job}", "EndTime=now+50")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert re.search(r"told the job to end: [1-9]\d* of 20000 rows are kept", log_of(at, job))


def test_a_node_that_fails_puts_the_job_back_and_it_resumes(slurm, at, expected):
    job = submit(
        *(slurm, at, "--nodes", "2", "--prompts", "many.txt", "--output", "out.jsonl"),
        *("--max-new-tokens", "32"),
    )
    rows_when(at / "out.jsonl.partial", 1)
    slurm.sh("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    slurm.wait(job, ("PENDING",))
    slurm.wait_idle()  # a node that comes back is told to end what it still has of this job
    slurm.start_requeued(job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log_of(at, job)
    assert re.search(r"going on: [1-9]\d* of 60 rows are done already", log_of(at, job))
    assert texts_of(at / "out.jsonl") == expected(MANY, 32)


def test_a_node_that_does_not_see_the_jobs_folder_is_named(slurm, at):
    hidden = at / "comboio-jobs"
    hidden.mkdir()
    with slurm.hidden_from(2, hidden):
        job = submit(slurm, at, "--nodes", "2", "--prompt", "x", "--no-requeue")
        ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert f"node2 does not see {hidden}/{job}" in log_of(at, job)


@pytest.mark.skipif(
    not Path("/etc/profile.d/modules.sh").exists(), reason="needs the package environment-modules"
)
def test_modules_are_loaded_before_the_environment(slurm, at):
    for name in ("gcc/14", "cuda/12.6"):
        file = at / "modulefiles" / name
        file.parent.mkdir(parents=True)
        file.write_text(f'#%Module1.0\nputs stderr "this is {name}"\n')
    env = {"MODULEPATH": str(at / "modulefiles")}
    words = ("--nodes", "1", "--prompt", "x", "--max-new-tokens", "2")
    job = submit(slurm, at, *words, "--module", "gcc/14", "--module", "cuda/12.6", env=env)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    assert re.search(r"this is gcc/14\n(.*\n)*this is cuda/12.6\n", log_of(at, job))
    job = submit(slurm, at, *words, "--module", "none/1", env=env)
    assert slurm.wait(job)["ExitCode"] == "2:0"
    assert "module load none/1 failed" in log_of(at, job)


def test_what_sbatch_refuses_is_one_sentence_in_its_own_words(slurm, at):
    words = ("submit", "pipeline", "--nodes", "2", "--prompt", "x")
    answer = slurm.manager(*words, "-p", "none", cwd=at)
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1 and "invalid partition specified: none" in answer.stderr


def test_a_submitted_job_is_remembered_and_can_be_read_as_json(slurm, at):
    words = ("--nodes", "1", "--prompt", "x", "--max-new-tokens", "2", "--job-name", "a b|c")
    said = json.loads(submit(slurm, at, *words, "--json"))
    assert slurm.wait(said["job_id"])["JobState"] == "COMPLETED"
    assert said["backend"] == "pipeline" and Path(said["log"]).is_file()
    record = next(
        it["submitted"]
        for it in map(json.loads, slurm.jobs_file.read_text().splitlines())
        if it.get("submitted", {}).get("job_id") == said["job_id"]
    )
    assert record["name"] == "a b|c"
    assert slurm.manager("logs", said["job_id"], check=True).stdout == Path(said["log"]).read_text()


def test_an_array_divides_the_prompts_and_its_last_task_joins_the_results(slurm, at, expected):
    job = submit(
        *(slurm, at, "--nodes", "1", "--array", "3", "--prompts", "prompts.txt"),
        *("--output", "out.jsonl", "--max-new-tokens", str(NEW_TOKENS)),
    )
    for index in range(3):
        ended = slurm.wait(f"{job}_{index}")
        log = (at / "comboio-jobs" / f"comboio-pipeline-{job}_{index}.out").read_text()
        assert ended["JobState"] == "COMPLETED", log
        assert "2 requests" in log
    assert texts_of(at / "out.jsonl") == expected(PROMPTS, NEW_TOKENS)
    indices = [json.loads(line)["index"] for line in (at / "out.jsonl").read_text().splitlines()]
    assert indices == list(range(6))
    assert [it.name for it in at.glob("out*")] == ["out.jsonl"]


def test_a_conda_environment_is_entered(slurm, at):
    # There is no conda to be had here; what it does for `conda activate` is put a folder on PATH.
    conda = at / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text(
        '#!/bin/bash\necho \'conda() { [ "$*" = "activate llm" ] && PATH=$ENV_BIN:$PATH; }\'\n'
    )
    conda.chmod(0o755)
    profile = at / "home"
    profile.mkdir()
    # A login shell sets PATH anew, and reads this after that.
    (profile / ".bash_profile").write_text(f"PATH={conda.parent}:$PATH\n")
    env = {"HOME": str(profile), "ENV_BIN": str(Path(sys.prefix, "bin"))}
    words = ("--nodes", "1", "--prompt", "x", "--max-new-tokens", "2")
    job = submit(slurm, at, *words, "--conda-env", "llm", env=env)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    job = submit(slurm, at, *words, "--conda-env", "none", env=env)
    assert slurm.wait(job)["ExitCode"] == "2:0"
    assert "conda activate none failed" in log_of(at, job)


def test_a_results_folder_that_the_node_does_not_see_is_named_before_a_model_is_loaded(slurm, at):
    hidden = at / "results"
    (hidden / "below").mkdir(parents=True)
    with slurm.hidden_from(1, hidden):
        job = submit(
            *(slurm, at, "--nodes", "1", "--sbatch-flag=--nodelist=node1", "--no-requeue"),
            *("--prompts", "prompts.txt", "--output", "results/below/out.jsonl"),
        )
        assert slurm.wait(job)["JobState"] == "FAILED"
    assert f"--output: node1 does not see the folder {hidden}/below" in log_of(at, job)


@pytest.mark.parametrize("when", ["all 2 sections are ready", "ready: a token went through"])
def test_a_single_prompt_begins_again_when_a_worker_dies(slurm, at, when):
    job = submit(slurm, at, "--nodes", "2", "--prompt", "Once", "--max-new-tokens", "300")
    log_when(at, job, when)
    (worker,) = processes("-m worker", "--index 1", str(at / "comboio-jobs" / job))
    worker.kill()
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    assert "is started anew" in log_of(at, job) and "300 tokens" in log_of(at, job)


def test_a_job_serves_until_it_is_cancelled_and_finishes_what_runs(slurm, at):
    job = submit(*(slurm, at, "--nodes", "2", "--serve"))
    log = log_when(at, job, "from your own machine: ssh -N -L 8000:")
    url = re.search(r"serving demo at (http://\S+);", log)[1]
    key_file = at / "comboio-jobs" / job / "api-key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600 and "key is in" in log
    key = key_file.read_text().strip()
    assert key not in log

    def ask(body: dict[str, object], authorization: str) -> urllib.request.addinfourl:
        request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode())
        request.add_header("authorization", authorization)
        return urllib.request.urlopen(request, timeout=90)

    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        ask({"prompt": "import"}, "Bearer nothing")
    refused.value.close()
    endless = {"prompt": "import", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with ask(endless, f"Bearer {key}") as running:
        assert running.readline().startswith(b"data: ")
        answer = slurm.manager("cancel", job, check=True, cwd=at)
        assert "finish the requests that run" in answer.stdout
        events = running.read()
    assert events.rstrip().endswith(b"data: [DONE]") and b'"finish_reason":"length"' in events
    assert slurm.wait(job)["JobState"] == "COMPLETED", log_of(at, job)
    assert "Traceback" not in log_of(at, job)
