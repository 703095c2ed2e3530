"""What the commands say where there is no Slurm, or where it does not answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.slurm_cluster import SlurmCluster, boot_cluster

pytestmark = pytest.mark.slurm

COMMANDS = (
    ["jobs"],
    ["logs", "1"],
    ["logs", "-f", "1"],
    ["wait", "1"],
    ["cancel", "1"],
    ["cancel", "--name", "x"],
    ["nodes"],
)


@pytest.fixture
def alone() -> Iterator[SlurmCluster]:
    """A cluster of one node that a test may break."""
    with boot_cluster(1) as cluster:
        yield cluster


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_machine_without_slurm_is_told_so(slurm, words):
    answer = slurm.manager(*words, env={"PATH": "/nowhere"})
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "is not on this machine's PATH: run this on a login node of the cluster" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_configuration_that_is_not_there_is_told_at_once(slurm, words):
    answer = slurm.manager(*words, env={"SLURM_CONF": "/nowhere/slurm.conf"}, timeout=60)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "SLURM_CONF names '/nowhere/slurm.conf', and there is no such file" in answer.stderr


def test_a_controller_that_is_down_ends_a_command_in_one_sentence_and_a_wait_not_at_all(alone):
    job_id = alone.submit("--hold", "--wrap", "true")
    with alone.start_manager("wait", job_id) as waiting:
        assert waiting.stderr is not None
        assert "JobHeldUser" in waiting.stderr.readline()
        alone.stop_controller()
        answer = alone.manager("jobs", timeout=60)
        assert (answer.returncode, answer.stdout) == (1, "")
        silent = "manager: the cluster's controller does not answer (squeue: "
        assert answer.stderr.startswith(silent)
        assert len(answer.stderr.splitlines()) == 1
        assert waiting.stderr.readline().startswith(silent)
        alone.start_controller()
        alone.sh("scontrol", "release", job_id)
        out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert out.startswith(f"job {job_id} (wrap) completed")
