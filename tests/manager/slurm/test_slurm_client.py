"""How Slurm's commands are run, with commands that play its failures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from manager.slurm.client import (
    ControllerSilent,
    SlurmRefused,
    client_environment,
    own_words,
    run_slurm,
)
from proto.errors import JobError, UsageError

Play = Callable[..., dict[str, str]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Put a shell script called like a command of Slurm on PATH."""

    def write(command: str, script: str, **environ: str) -> dict[str, str]:
        path = tmp_path / command
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}", **environ}

    return write


def test_what_a_command_prints_is_returned_and_warnings_are_not(play):
    environ = play("squeue", "echo warning >&2; printf '%s|' \"$@\"")
    assert run_slurm(["squeue", "a b", "$HOME"], environ=environ) == "a b|$HOME|"


def test_a_command_may_be_given_text(play):
    assert run_slurm(["sbatch"], environ=play("sbatch", "cat"), stdin="#!/bin/sh\n") == (
        "#!/bin/sh\n"
    )


def test_text_that_is_no_utf8_is_no_error(play):
    assert (
        run_slurm(["squeue"], environ=play("squeue", r"printf 'a\377'"))
        == "a\N{REPLACEMENT CHARACTER}"
    )


def test_a_command_that_is_missing_is_the_callers_mistake(tmp_path):
    with pytest.raises(UsageError, match=r"^sbatch is not on this machine's PATH: run this on a "):
        run_slurm(["sbatch"], environ={"PATH": str(tmp_path)})


def test_slurms_own_words_are_kept_in_one_line(play):
    environ = play(
        "sbatch",
        "echo 'sbatch: error: invalid partition specified: gpuu' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2\n"
        "exit 1",
    )
    with pytest.raises(SlurmRefused) as refused:
        run_slurm(["sbatch"], environ=environ)
    assert refused.value.said == (
        "invalid partition specified: gpuu; "
        "Batch job submission failed: Invalid partition name specified"
    )
    assert str(refused.value) == f"sbatch: {refused.value.said}"
    assert isinstance(refused.value, JobError)


def test_a_command_that_fails_without_a_word_is_told_with_its_exit_code(play):
    with pytest.raises(SlurmRefused, match=r"^scancel: ended with exit code 7 and said nothing$"):
        run_slurm(["scancel"], environ=play("scancel", "exit 7"))


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Zero Bytes were transmitted or received",
    ],
)
def test_a_controller_that_does_not_answer_is_told_apart(play, said):
    with pytest.raises(ControllerSilent, match="controller does not answer") as silent:
        run_slurm(["squeue"], environ=play("squeue", f"echo '{said}' >&2; exit 1"))
    assert "error:" not in str(silent.value)


def test_a_machine_outside_of_any_cluster_is_the_callers_mistake(play):
    said = "squeue: fatal: Could not establish a configuration source"
    with pytest.raises(UsageError, match="squeue finds no cluster from this machine"):
        run_slurm(["squeue"], environ=play("squeue", f"echo '{said}' >&2; exit 1"))


def test_a_command_that_hangs_is_ended(play):
    with pytest.raises(ControllerSilent, match=r"^squeue got no answer within 0\.2 s: "):
        run_slurm(["squeue"], environ=play("squeue", "exec sleep 600"), timeout_s=0.2)


def test_a_configuration_that_is_not_there_is_not_waited_for(play):
    environ = play("squeue", "exec sleep 600", SLURM_CONF="/nowhere/slurm.conf")
    with pytest.raises(UsageError, match=r"SLURM_CONF names '/nowhere/slurm.conf'"):
        run_slurm(["squeue"], environ=environ)


def test_formats_of_the_users_own_are_left_out_and_their_sbatch_options_kept():
    told = {
        "SQUEUE_FORMAT": "%i",
        "SQUEUE_FORMAT2": "jobid",
        "SACCT_FORMAT": "jobid",
        "SINFO_FORMAT": "%n",
        "SCANCEL_INTERACTIVE": "1",
        "SLURM_TIME_FORMAT": "relative",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "bio42",
        "LC_ALL": "pt_BR.UTF-8",
    }
    assert client_environment(told) == {
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "bio42",
        "LC_ALL": "C",
    }


def test_prefixes_and_repetitions_are_left_out():
    said = "srun: error: it failed.\nsrun: error: it failed.\n\nslurm_load_jobs error: why\n"
    assert own_words(said) == "it failed; why"
