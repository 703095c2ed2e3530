"""Hand a file of scripts/slurm to sbatch: the command line, its environment, what came of it.

The files are the ones that people submit by hand; nothing is rendered. Knows no backend.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager.slurm.client import cluster_name, run_slurm
from manager.slurm.records import JobRecord, Records
from manager.slurm.site import Site
from proto.errors import Error, JobError, UsageError

ROOT: Final = Path(__file__).resolve().parent.parent.parent
# In a source folder, and where an installed distribution has them.
FOLDERS: Final = (ROOT / "scripts" / "slurm", ROOT / "manager" / "sbatch")

# What a job must not inherit: it would stand in the job's environment for everybody who may look.
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL|PRIVATE", re.I)
# Paths to secrets are none.
_PATH: Final = re.compile(r"_(PATH|FILE|DIR|HOME)$", re.I)
HUB_TOKENS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
HUB_TOKEN_PATH: Final = "HF_TOKEN_PATH"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One job, ready for sbatch."""

    backend: str
    script: Path
    name: str
    site: Site
    flags: tuple[str, ...]  # of sbatch, beside the site's
    words: tuple[str, ...]  # for the script
    variables: Mapping[str, str]  # that the script reads, beside the site's
    log: str | None = None  # with Slurm's patterns; None: in the jobs' folder

    @property
    def log_pattern(self) -> str:
        """Where the log goes, as sbatch takes it."""
        return self.log or str(self.site.jobs_folder.absolute() / "%x-%j.out")

    def log_of(self, job_id: str) -> str:
        """Where the log of a job goes; of an array's tasks, %a stays."""
        found = self.log_pattern.replace("%j", job_id).replace("%A", job_id)
        return found.replace("%x", self.name)

    def command(self) -> list[str]:
        """The words of the call."""
        return [
            "sbatch",
            "--parsable",
            f"--job-name={self.name}",
            f"--output={self.log_pattern}",
            *self.flags,
            *self.site.flags(),
            str(self.script),
            *self.words,
        ]

    def environment(self) -> dict[str, str]:
        """What the script reads; the rest comes from `job_environment`."""
        return {**self.site.environment(), **self.variables}

    def describe(self) -> str:
        """The call as a shell would take it."""
        variables = [f"{name}={shlex.quote(text)}" for name, text in self.environment().items()]
        return " ".join([*variables, shlex.join(self.command())])


def find_script(name: str) -> Path:
    """A file of scripts/slurm.

    Raises:
        Error: this installation lacks it.
    """
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise Error(
        f"this installation of comboio has no {name}: it was looked for in "
        f"{' and '.join(map(str, FOLDERS))}; install comboio anew."
    )


def submit_job(submission: Submission, environ: Mapping[str, str]) -> JobRecord:
    """Submit, and write down what was.

    Raises:
        UsageError: the jobs' folder cannot be written.
        JobError: sbatch is not there or said no; in its own words.
    """
    folder = submission.site.jobs_folder.absolute()
    _make_folder(folder)
    job_environ = job_environment(environ, folder) | submission.environment()
    said = run_slurm(submission.command(), environ=job_environ).strip()
    job_id, _, cluster = said.splitlines()[-1].partition(";") if said else ("", "", "")
    if not job_id.isdigit():
        raise JobError(f"sbatch did not say which job it made: {said[:200]!r}")
    record = JobRecord(
        job_id=job_id,
        cluster=cluster or cluster_name(environ),
        backend=submission.backend,
        name=submission.name,
        submitted_at=time.time(),
        folder=str(folder / job_id),
        log=submission.log_pattern,
        command=("manager", *sys.argv[1:]),
    )
    try:
        Records.default(environ).add(record)
    except JobError as exc:
        raise JobError(f"job {job_id} is submitted, but could not be written down: {exc}") from exc
    return record


def job_environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The caller's environment without secrets, and without another job's traces.

    A token for the hub goes into a file that only its owner can read; the job is told its path.
    """
    kept = {
        name: value
        for name, value in environ.items()
        if not (_SECRET.search(name) and not _PATH.search(name))
        and not (name.startswith("SLURM_") and name != "SLURM_CONF")
        and name not in ("SBATCH_EXPORT", "SBATCH_EXCLUSIVE")
    }
    token = next((environ[name] for name in HUB_TOKENS if environ.get(name)), None)
    if token is not None:
        path = folder / "hub-token"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w") as file:
                os.fchmod(handle, 0o600)
                file.write(token)
        except OSError as exc:
            raise UsageError(f"cannot write {path}: {exc.strerror}.") from exc
        kept[HUB_TOKEN_PATH] = str(path)
    return kept


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(
            f"cannot make the jobs' folder {folder}: {exc.strerror}; name another one with "
            "--jobs-folder, on a file system that all nodes see."
        ) from exc
    if not os.access(folder, os.W_OK):
        raise UsageError(
            f"you may not write in {folder}: name another folder with --jobs-folder, on a file "
            "system that all nodes see."
        )
