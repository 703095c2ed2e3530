"""`manager nodes` on a real cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.slurm_cluster import CPUS, GPUS, MEMORY_MB, SlurmCluster
from tests.support.tiny_gguf import write_tiny_gguf

pytestmark = pytest.mark.slurm

DEMO = ROOT / "engine" / "demo"
MEMORY = MEMORY_MB << 20


@pytest.fixture(autouse=True)
def _nodes_are_mended(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.sh("scontrol", "update", "nodename=node[1-3]", "state=resume", check=False)
    slurm.mend()


def nodes(slurm: SlurmCluster, *words: object) -> dict:
    return json.loads(slurm.manager("nodes", "--json", *words, check=True).stdout)


def test_nodes_that_are_alike_share_a_line(slurm):
    lines = slurm.manager("nodes", check=True).stdout.splitlines()
    assert lines[0] == "partition debug (the default): 3 nodes, 3 idle"
    assert lines[2].split("  ")[0] == "NODES"
    assert lines[3].split() == [
        *("3", "idle", f"{CPUS}/{CPUS}", "536.9", "GB/536.9", "GB"),
        *(f"{GPUS}/{GPUS}", "node[1-3]"),
    ]
    assert len(lines) == 4


def test_what_jobs_hold_is_not_idle(slurm):
    job_id = slurm.submit("-w", "node2", "--gres=gpu:3", "--cpus-per-task=5", "--wrap", "sleep 600")
    slurm.wait_running(job_id)
    found = {it["name"]: it for it in nodes(slurm)["nodes"]}
    busy, idle = found["node2"], found["node1"]
    assert (busy["idle_cpus"], busy["idle_gpus"], busy["is_idle"]) == (CPUS - 5, GPUS - 3, False)
    assert (idle["idle_cpus"], idle["idle_gpus"], idle["is_idle"]) == (CPUS, GPUS, True)
    assert (idle["memory_bytes"], idle["free_memory_bytes"]) == (MEMORY, MEMORY)
    table = slurm.manager("nodes", check=True).stdout
    assert "mixed" in table and "node[1,3]" in table


def test_a_drained_node_is_shown_with_its_reason(slurm):
    slurm.sh("scontrol", "update", "nodename=node3", "state=drain", "reason=bad fan")
    lines = slurm.manager("nodes", check=True).stdout.splitlines()
    assert lines[0].endswith("3 nodes, 2 idle")
    assert lines[-1].startswith("node3: bad fan [")
    assert any(line.split()[1] == "drained" for line in lines[3:5])
    node = nodes(slurm)["nodes"][2]
    assert (node["is_usable"], node["idle_cpus"], node["free_memory_bytes"]) == (False, 0, 0)


def test_a_partition_is_chosen_by_option_or_by_the_settings_of_the_site(slurm, tmp_path):
    assert nodes(slurm, "--partition", "long")["partition"]["name"] == "long"
    (tmp_path / "comboio.toml").write_text(
        '[slurm]\npartition = "long"\n[slurm.profiles.other]\npartition = "debug"\n'
    )
    lines = [
        slurm.manager("nodes", *words, cwd=tmp_path, check=True).stdout.splitlines()[0]
        for words in ([], ["--profile", "other"], ["-p", "debug"])
    ]
    assert [line.split()[1].rstrip(":") for line in lines] == ["long", "debug", "debug"]


def test_a_partition_that_there_is_not_is_the_callers_mistake(slurm):
    answer = slurm.manager("nodes", "--partition", "lnog")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == (
        "manager: --partition lnog: the cluster has no such partition; did you mean 'long'?\n"
    )


@pytest.mark.parametrize("option", ["--context", "--dtype", "--gpu-memory"])
def test_options_about_a_model_want_a_model(slurm, option):
    answer = slurm.manager("nodes", option, "16")
    assert answer.returncode == 2
    assert answer.stderr == f"manager: {option} has no effect without --model: name the model.\n"


def test_a_model_is_reckoned_against_the_memory_of_nodes(slurm):
    lines = slurm.manager("nodes", "--model", DEMO, "--context", "512", check=True).stdout
    assert lines.splitlines()[-3:] == [
        "demo: 7.9 MB of weights + 1.0 MB of KV for 512 tokens, +20 %: 1 node of 536.9 GB (each "
        "10.7 MB)",
        f"Now 3 of that size are idle: `manager submit pipeline --nodes 1 --model {DEMO} ...` "
        "could start at once.",
        "That is main memory: Slurm does not know how much the GPUs have; to reckon with it, pass "
        "--gpu-memory, for example 40GB.",
    ]


def test_a_model_is_reckoned_against_the_memory_of_gpus(slurm):
    found = nodes(slurm, "--model", DEMO, "--gpu-memory", "4MB")["need"]
    assert (found["place"], found["num_sections"], found["num_nodes"]) == ("GPU", 4, 1)
    assert found["section_bytes"] <= found["place_bytes"] == 4_000_000
    job_id = slurm.submit("--exclusive", "-N3", "--wrap", "sleep 600")
    slurm.wait_running(job_id)
    said = slurm.manager("nodes", "--model", DEMO, "--gpu-memory", "4MB", check=True).stdout
    assert "4 GPUs of 4.0 MB" in said and ", on 1 node" in said
    assert "Now none of that size are idle: a job for 1 node would wait." in said


def test_a_model_that_is_too_large_for_all_nodes_is_said_to_be(slurm):
    said = slurm.manager("nodes", "--model", DEMO, "--gpu-memory", "1MB", check=True).stdout
    assert said.splitlines()[-1].startswith(
        "demo: 7.9 MB of weights + 2.1 MB of KV for 1024 tokens"
    )
    assert "+20 %: does not fit. Cut into 8 sections, the largest needs " in said
    assert "the largest GPU of partition debug has 1.0 MB." in said


def test_a_gguf_file_is_reckoned_for_llama_server(slurm, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    found = nodes(slurm, "--model", path)["need"]
    assert found["weights_bytes"] > 0 and found["num_nodes"] == 1
    answer = slurm.manager("nodes", "--model", path, "--dtype", "float16")
    assert (answer.returncode, answer.stdout) == (2, "")
    broken = Path(tmp_path, "broken.gguf")
    broken.write_bytes(b"no model")
    answer = slurm.manager("nodes", "--model", broken)
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1


def test_a_size_that_is_none_is_the_callers_mistake(slurm):
    answer = slurm.manager("nodes", "--model", DEMO, "--gpu-memory", "much")
    assert answer.returncode == 2
    assert answer.stderr.startswith("manager: --gpu-memory: 'much' is not a size; write for ")
