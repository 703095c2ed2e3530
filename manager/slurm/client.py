"""Run one of Slurm's client commands, with a deadline, and say in a sentence what went wrong.

Knows how Slurm's commands fail: that they are missing, that nobody answers, that they refuse. Knows
nothing of what they print when all is well.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from proto.errors import JobError, UsageError

# A busy controller may think for half a minute; clients give up on a dead one after ten seconds.
TIMEOUT_S: Final = 60.0

# People's own columns, filters and time formats, and scancel's questions: they would change what
# is parsed. What stands for an option of sbatch stays, for people mean it.
USERS_OWN: Final = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURM_TIME_FORMAT")

_PREFIX: Final = re.compile(r"^[\w-]+: (?:error|fatal): |^[\w-]+ error: ")
_UNREACHABLE: Final = re.compile(
    r"unable to contact slurm controller|slurm_persist_conn_open|connection refused"
    r"|socket timed out|zero bytes were transmitted|slurm backup controller in standby",
    re.IGNORECASE,
)
_NOT_CONFIGURED: Final = re.compile(
    r"could not establish a configuration source|dns srv lookup failed"
    r"|unable to process configuration file",
    re.IGNORECASE,
)


class ControllerSilent(JobError):
    """Slurm's controller did not answer; it may do so a little later."""


class SlurmRefused(JobError):
    """A command of Slurm said no; `said` are its own words in one line."""

    def __init__(self, command: str, said: str) -> None:
        self.command, self.said = command, said
        super().__init__(f"{command}: {said}")


def run_slurm(
    words: Sequence[str],
    *,
    timeout_s: float = TIMEOUT_S,
    environ: Mapping[str, str] | None = None,
    stdin: str | None = None,
) -> str:
    """Run a command to its end and return what it printed.

    Args:
        words: the command (sbatch, squeue, ...) and its arguments.
        timeout_s: it is killed after so many seconds.
        environ: instead of this process's environment.
        stdin: text for its standard input; without, there is nothing to read.
    Raises:
        UsageError: there is no such command here, or it has no cluster to talk to.
        ControllerSilent: nobody answered in time.
        SlurmRefused: it said no.
    """
    command = words[0]
    of_client = submission_environment if command == "sbatch" else client_environment
    env = of_client(os.environ if environ is None else environ)
    _check_configuration(env)
    try:
        done = subprocess.run(
            list(words),
            input=stdin or "",
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # a job's name may be any bytes
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as exc:
        raise UsageError(
            f"{command} is not on this machine's PATH: run this on a login node of the cluster, "
            "or load its Slurm module."
        ) from exc
    except OSError as exc:
        raise JobError(f"cannot run {command}: {exc.strerror}.") from exc
    except subprocess.TimeoutExpired as exc:
        raise ControllerSilent(
            f"{command} got no answer within {timeout_s:g} s: the cluster's controller is down "
            "or not reachable from here; `scontrol ping` says which."
        ) from exc
    if done.returncode:
        raise _refusal(command, done.stderr or done.stdout, done.returncode)
    return done.stdout


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands: plain English, and no formats of the user's own."""
    kept = {name: value for name, value in environ.items() if not name.startswith(USERS_OWN)}
    return {**kept, "LC_ALL": "C"}


def submission_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for sbatch, which the job inherits: its language stays the user's."""
    return {name: value for name, value in environ.items() if not name.startswith(USERS_OWN)}


def cluster_name(environ: Mapping[str, str] | None = None) -> str:
    """What the cluster calls itself: numbers of jobs are unique within it.

    Raises:
        Error: as `run_slurm`.
    """
    said = run_slurm(["scontrol", "show", "config"], environ=environ)
    found = re.search(r"^ClusterName\s*=\s*(\S+)", said, re.MULTILINE)
    return found[1] if found else ""


def own_words(said: str) -> str:
    """What a command wrote on stderr as one line, without `sbatch: error: ` before each piece."""
    lines = [_PREFIX.sub("", line.strip()).strip() for line in said.splitlines()]
    return "; ".join(dict.fromkeys(line.rstrip(".") for line in lines if line))


def _check_configuration(env: Mapping[str, str]) -> None:
    """A client whose configuration is missing waits a minute for it; nobody else has to."""
    named = env.get("SLURM_CONF")
    if named is not None and not Path(named).is_file():
        raise UsageError(
            f"SLURM_CONF names {named!r}, and there is no such file: unset it, or set it to the "
            "slurm.conf of the cluster."
        )


def _refusal(command: str, said: str, exit_code: int) -> JobError | UsageError:
    words = own_words(said)
    if _NOT_CONFIGURED.search(words):
        return UsageError(
            f"{command} finds no cluster from this machine ({words}): run this on a login node, "
            "or set SLURM_CONF."
        )
    if _UNREACHABLE.search(words):
        return ControllerSilent(
            f"the cluster's controller does not answer ({command}: {words}): try again later, or "
            "ask its administrators; `scontrol ping` shows its state."
        )
    return SlurmRefused(command, words or f"ended with exit code {exit_code} and said nothing")
