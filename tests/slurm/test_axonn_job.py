"""AxoNN on a real cluster, in its test mode on CPUs: by srun over nodes, submitted and by hand."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.finetuning import EXCHANGES, run, save_model, write_jsonl
from tests.support.ranks import check_equal, rank_process, settings_of, words_of
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

STEPS = 14
PATIENCE_S = 150


@pytest.fixture
def at(slurm: SlurmCluster, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that all nodes see, with a model and data."""
    folder = slurm.folder / request.node.name
    folder.mkdir()
    save_model(folder / "tiny")
    write_jsonl(folder / "exchanges.jsonl", EXCHANGES)
    yield folder
    slurm.mend()


def settings_at(at: Path, name: str = "run", steps: int = STEPS):
    return settings_of(at / "tiny", at / "exchanges.jsonl", at / name, steps=steps)


def wait_for(path: Path, words: str) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < give_up_s, f"no {words!r} in {path} in time"
        time.sleep(0.02)  # a file tells nobody that it grew


def test_four_ranks_on_two_nodes_stopped_and_queued_again_learn_what_one_process_learns(slurm, at):
    words = words_of(settings_at(at), 4, "--tensor_parallelism", "2", "--data_parallelism", "2")
    job = slurm.manager(
        *("submit", "axonn", "--nodes", "2", "--tasks-per-node", "2", "--restarts", "1"),
        *words[words.index("axonn") + 1 :],
        check=True,
        cwd=at,
    ).stdout.strip()
    wait_for(at / "run" / "metrics.jsonl", '"step": 4,')
    slurm.sh("scancel", "--signal=TERM", job)  # as Slurm does before the time limit
    slurm.start_requeued(job)
    ended = slurm.wait(job, timeout=PATIENCE_S)
    log = next((at / "comboio-jobs").glob("*.out")).read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "4 ranks by srun: node1 (2), node2 (2); tensor 2 by depth x data 2" in log
    assert "TEST MODE" in log and "training goes on after step " in log
    assert "Traceback" not in log
    run(settings_at(at, "plain"))
    check_equal(at / "run", at / "plain")


def test_a_rank_that_is_killed_on_another_node_ends_all_with_its_name_and_log(slurm, at):
    words = words_of(
        settings_at(at, steps=4000), 2, "--tensor-parallelism", "2", "--parallelism-axis", "column"
    )
    # By hand, where Slurm itself would leave the other rank waiting; and without any PMI.
    srun = ["srun", "--mpi=none", "--kill-on-bad-exit=0", "--nodes=2", "--ntasks-per-node=1"]
    with subprocess.Popen(
        [*srun, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, cwd=at, env=slurm.env,
    ) as process:  # fmt: skip
        wait_for(at / "run" / "metrics.jsonl", '"step": 4,')
        rank_process(at / "run", "SLURM_PROCID", 1).send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    [line] = re.findall(r"^manager: .*$", said, re.MULTILINE)
    assert "rank 1 on node2" in line and "died without a word" in line
    assert f"its log is {at / 'run' / 'ranks' / 'rank-00001.log'}" in line
