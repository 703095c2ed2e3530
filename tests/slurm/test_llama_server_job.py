"""`manager submit llama-server` on a real cluster, with llama.cpp's real programs."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.llama_cpp import llama_cpp_dir
from tests.support.slurm_cluster import SlurmCluster
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.slurm, pytest.mark.llama_cpp]


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see, with a model, prompts and a config.json as people have it."""
    folder = slurm.folder / re.sub(r"\W+", "-", request.node.name)
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "system_prompt.txt").write_text("Be brief.\n")
    (folder / "prompts" / "user_prompt.txt").write_text("What is a train?\n")
    write_tiny_gguf(folder / "tiny.gguf")
    write_config(folder)
    yield folder
    slurm.mend()


def write_config(folder: Path, **changes: object) -> None:
    config = {
        "job_name": "llama-2-nodes",
        "output_log": "logs.txt",
        "result_file": "result.txt",
        "dir_llama_script": str(llama_cpp_dir()),
        "model": "tiny.gguf",
        "port_rpc": 50052,
        "port_server": 8080,
        "venv_dir": "",
        "prompt_dir": "prompts",
        "nodes": 3,
        "ntasks": 3,
        "time": "00:10:00",
        "sbatch_script": "",
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def submit(slurm: SlurmCluster, at: Path, *words: str) -> str:
    words = ("submit", "llama-server", "--config", "config.json", "--max-new-tokens", "24", *words)
    return slurm.manager(*words, check=True, cwd=at).stdout.strip()


def when(path: Path, words: str, timeout_s: float = 240.0) -> str:
    """The text of a file, once it has these words."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if path.exists() and words in (text := path.read_text(errors="replace")):
            return text
        time.sleep(0.05)  # a file tells nobody that it grew
    raise AssertionError(f"no {words!r} in {path} in time:\n{path.read_text()}")


def llama_processes(slurm: SlurmCluster, at: Path, *words: str) -> list[psutil.Process]:
    """llama.cpp's programs of this test on the cluster's nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        text = " ".join(line)
        is_ours = str(at) in text or f" {slurm.network}." in text
        if Path(line[0]).name.endswith("-server") and is_ours and all(it in text for it in words):
            found.append(process)
    return found


def test_a_config_of_the_scripts_before_runs_over_three_nodes(slurm, at):
    job = submit(slurm, at)
    ended = slurm.wait(job)
    log = (at / "logs.txt").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert (ended["JobName"], ended["NumNodes"], ended["TimeLimit"]) == (
        *("llama-2-nodes", "3", "00:10:00"),
    )
    timings = json.loads((at / "result.txt.timings.json").read_text())
    assert (at / "result.txt").read_text() and timings["completion_tokens"] > 0
    nodes = [address.rpartition(":")[0][-2:] for address in timings["rpc_servers"]]
    assert nodes == [".2", ".3"], "the first node runs llama-server"
    assert "node1 runs llama-server" in log
    assert re.search(r"node2 lends itself with an rpc-server at 10\.\S+\.2:50052", log)
    assert not llama_processes(slurm, at), "everything is ended"


def test_its_answer_is_the_one_that_a_run_here_gives(slurm, at):
    here = slurm.manager(
        *("llama-server", "run", "--config", "config.json", "--nodes", "1", "--ntasks", "1"),
        *("--max-new-tokens", "24", "--result-file", "here.txt"),
        check=True,
        cwd=at,
    )
    assert slurm.wait(submit(slurm, at))["JobState"] == "COMPLETED"
    assert (at / "result.txt").read_text() == (at / "here.txt").read_text(), here


def test_an_rpc_server_that_dies_is_started_once_more(slurm, at):
    (at / "p.txt").write_text("Tell me a long story\n" * 12)
    job = submit(
        *(slurm, at, "--prompts", "p.txt", "--output", "out.jsonl", "--parallel", "2"),
        *("--max-new-tokens", "100"),
    )
    when(at / "out.jsonl.partial", "completion_tokens")
    (victim,) = llama_processes(slurm, at, "rpc-server", ".2 -p")
    victim.kill()
    ended = slurm.wait(job)
    log = (at / "logs.txt").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "starting everything once more" in log and "on node2, rpc-server at 10." in log
    rows = [json.loads(line) for line in (at / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["error"] for row in rows} == {None}
    assert len({row["text"] for row in rows}) == 1, "greedy: the loss changed nothing"


def test_a_server_that_is_kept_answers_whoever_has_the_jobs_key(slurm, at):
    write_config(at, prompt_dir="")
    job = submit(slurm, at, "--keep", "--time", "5")
    url = re.search(r"^ready (\S+)$", when(at / "logs.txt", "\nready http"), re.MULTILINE)[1]
    assert url.startswith("http://10.")
    generate = ("generate", "hello", "--backend", "llama-server", "--server", url)
    key = at / "comboio-jobs" / job / "secret"
    answer = slurm.manager(*generate, "--api-key-file", str(key), "--max-new-tokens", "4")
    assert answer.returncode == 0 and answer.stdout.strip(), answer
    stranger = slurm.manager(*generate, "--max-new-tokens", "4")
    assert stranger.returncode != 0 and "key" in stranger.stderr
    (server,) = llama_processes(slurm, at, "llama-server")
    assert key.read_text() not in " ".join([*server.cmdline(), *server.environ().values()])
    slurm.manager("cancel", job, check=True)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    assert not llama_processes(slurm, at), "everything is ended"


def test_programs_of_another_build_on_a_node_are_refused(slurm, at):
    folder = llama_cpp_dir()
    own = at / "llama"
    shutil.copytree(folder.parent, own, ignore=lambda *_: ["include", "llama_cpp"])
    other = at / "other"
    shutil.copytree(own, other)
    server = other / folder.name / "llama-server"
    server.unlink()
    server.write_text(
        "#!/bin/bash\n"
        f'[ "$1" = --version ] && {{ echo "version: 9.9 (other)"; exit 0; }}\n'
        f'LD_LIBRARY_PATH={folder.parent}/lib exec {folder}/llama-server "$@"\n'
    )
    server.chmod(0o755)
    write_config(at, dir_llama_script=str(own / folder.name))
    with slurm.replaced_on(2, own, other):
        ended = slurm.wait(submit(slurm, at, "--no-requeue"))
    log = (at / "logs.txt").read_text()
    assert ended["JobState"] == "FAILED", log
    assert re.search(r"^manager: node1 has llama.cpp .* and node2 has .*9\.9", log, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": "x"}, "unknown key 'modle'"),
        ({"model": "none.gguf"}, "none.gguf"),
        ({"nodes": "three"}, "nodes"),
        ({"ntasks": 2}, "ntasks is 2 and nodes is 3"),
        ({"sbatch_script": "none.sh"}, "none.sh, and there is no such file"),
        ({"prompt_dir": "none"}, "none"),
    ],
)
def test_a_mistake_in_the_config_is_one_sentence_before_anything_is_submitted(
    slurm, at, changes, sentence
):
    write_config(at, **changes)
    answer = slurm.manager("submit", "llama-server", "--config", "config.json", cwd=at)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.count("\n") == 1 and sentence in answer.stderr


def test_a_script_of_the_users_own_gets_the_variables_that_it_expects(slurm, at):
    own = at / "own.sh"
    own.write_text('#!/bin/bash\necho "$MODEL $PORT_RPC $PROMPT_DIR $RESULT_FILE"\n')
    write_config(at, sbatch_script="own.sh")
    assert slurm.wait(submit(slurm, at))["JobState"] == "COMPLETED"
    assert (at / "logs.txt").read_text() == (f"{at}/tiny.gguf 50052 {at}/prompts {at}/result.txt\n")


def test_a_port_that_is_taken_ends_the_job_in_a_sentence(slurm, at):
    first = submit(slurm, at, "--keep")
    when(at / "logs.txt", "\nready http")
    write_config(at, output_log="second.txt", result_file="second-result.txt")
    second = submit(slurm, at, "--no-requeue", "--job-name", "second")
    ended = slurm.wait(second)
    log = (at / "second.txt").read_text()
    assert ended["JobState"] == "FAILED", log
    assert re.search(r"^manager: task \d on node\d: port 50052 of 10\.", log, re.MULTILINE), log
    slurm.manager("cancel", first, check=True)
