"""The README's commands for a cluster, as they stand, on a real one.

Only what is peculiar to the reader's cluster is put in its place: the model's folder, the number of
the job, and the folder of llama.cpp.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.llama_cpp import llama_cpp_dir
from tests.support.processes import ROOT
from tests.support.slurm_cluster import SlurmCluster
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.slurm

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROFILE = """
[slurm]
time = "10"
[slurm.profiles.santos-dumont]
partition = "long"
gpus-per-node = 4
"""


def block(name: str) -> str:
    """The commands behind a comment `<!-- slurm: NAME -->`."""
    found = re.search(rf"<!-- slurm: {name} -->\n```sh\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found[1]


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Path:
    """A checkout as a newcomer has it, on the shared file system."""
    folder = slurm.folder / request.node.name
    folder.mkdir()
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "prompts.txt").write_text("def add(a, b):\nimport os\n")
    return folder


def run(slurm: SlurmCluster, at: Path, commands: str) -> str:
    """What a shell prints for these commands; the first that fails ends them."""
    path = f"{Path(sys.prefix, 'bin')}:{slurm.env['PATH']}"
    done = slurm.sh(
        *("bash", "-euc", commands), cwd=at, env={"PATH": path}, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_nothing_to_a_result(slurm, at):
    (at / "comboio.toml").write_text(PROFILE)
    model = ROOT / "engine" / "demo"
    job = run(slurm, at, block("submit").replace("/models/llama-70b", str(model))).strip()
    said = run(slurm, at, block("follow").replace("4711", job))
    assert re.search(rf"^ *{job} +comboio-pipeline ", said, re.MULTILINE), said
    assert "what each node did" in said and f"job {job} " in said
    assert slurm.job(job)["Partition"] == "long"
    assert len((at / "results.jsonl").read_text().splitlines()) == 2


def test_by_hand(slurm, at):
    said = run(slurm, at, block("by hand"))
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert len((at / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.llama_cpp
def test_llama_server_with_the_config_that_the_page_shows(slurm, at):
    shown = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    write_tiny_gguf(at / "tiny.gguf")
    own = {
        "dir_llama_script": str(llama_cpp_dir()),
        "model": "tiny.gguf",
        "venv_dir": os.fspath(sys.prefix),
    }
    (at / "config.json").write_text(json.dumps(shown | own))
    (at / "prompts").mkdir()
    (at / "prompts" / "user_prompt.txt").write_text("What is a train?")
    job = run(slurm, at, block("llama-server")).strip()
    assert slurm.wait(job)["JobState"] == "COMPLETED", (at / "logs.txt").read_text()
    assert (at / "result.txt").read_text()
