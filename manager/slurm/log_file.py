"""Where a job's log is, and reading it while it grows.

The file lies on a file system that this machine shares with the nodes: it may show up late, grow
late, and begin anew when a job is requeued.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from manager.slurm.client import SlurmRefused, run_slurm
from manager.slurm.job import Job
from manager.slurm.listings import parse_pages
from manager.slurm.lookup import Found, printable
from manager.slurm.records import JobRecord
from proto.errors import JobError, UsageError

CHUNK_BYTES: Final = 1 << 20
TAIL_BYTES: Final = 1 << 16  # in which the last words of a job are looked for

# How those lines begin that say why a job went wrong, the best ones first.
LAST_WORDS: Final = (b"manager: ", b"worker: ", b"srun: error: ", b"slurmstepd: error: ")


def find_log(found: Found, environ: Mapping[str, str]) -> Path:
    """The file that a job's standard output goes to; it need not exist yet.

    Raises:
        UsageError: the job is an array, with a log for each task.
        JobError: nobody knows where its log is.
    """
    logs = _logs(found, environ)
    if len(logs) == 1:
        return logs.popitem()[1]
    if logs:
        names = ", ".join(list(logs)[:8]) + (", ..." if len(logs) > 8 else "")
        raise UsageError(f"{found.title} is an array with a log for each task: name one ({names}).")
    if found.job.is_waiting:
        raise JobError(f"{found.title} has not started: its tasks have no logs yet.")
    raise JobError(
        f"Slurm has forgotten where the log of {found.title} is: it was not submitted from here, "
        f"so look for slurm-{found.job_id}.out in the folder that it was submitted from."
    )


class GrowingFile:
    """A log that is read piece by piece, from wherever one left off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.began_anew = 0  # times that the file was cut off, by a requeued job
        self._offset = 0

    def read(self) -> bytes:
        """What has come since the last call, up to `CHUNK_BYTES`; empty if there is no file yet.

        Raises:
            JobError: there is a file, and it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                    self.began_anew += 1
                file.seek(self._offset)
                piece = file.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise JobError(f"cannot read the log {self.path}: {exc.strerror}.") from exc
        self._offset += len(piece)
        return piece

    def exists(self) -> bool:
        """Whether it is there; asks the folder first, so that a shared file system looks anew."""
        try:
            return self.path.name in os.listdir(self.path.parent)
        except OSError:
            return False

    def skip_to_last(self, num_lines: int) -> None:
        """Go on reading `num_lines` lines before the end that the file has now."""
        try:
            with self.path.open("rb") as file:
                self._offset = _start_of_last(file.fileno(), num_lines)
        except OSError:
            return  # `read` says what there is to say


def last_words(path: Path) -> str | None:
    """The line near the log's end that says why its job failed, or None."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for start in LAST_WORDS:
        for line in reversed(lines):
            if line.startswith(start):
                return printable(line.decode("utf-8", "replace").strip())
    return None


def _logs(found: Found, environ: Mapping[str, str]) -> dict[str, Path]:
    """Id of a job or task -> its log."""
    if found.record is not None:
        logs = {job.id: _expanded(found.record, job) for job in found.jobs if "[" not in job.id}
        # All tasks of an array may share one file.
        return logs if len(set(logs.values())) > 1 else dict(list(logs.items())[:1])
    try:
        pages = parse_pages(run_slurm(["scontrol", "show", "job", found.job_id], environ=environ))
    except SlurmRefused:
        return {}
    return {
        page.id: Path(page.log)
        for page in sorted(pages, key=lambda it: it.place)
        if page.log and page.answers_to(found.job_id) and "[" not in page.id
    }


def _expanded(record: JobRecord, job: Job) -> Path:
    """The log of the record, with the job's own values for sbatch's patterns."""
    values = {
        "A": job.number,
        "a": job.id.partition("_")[2],
        "j": job.raw_id,
        "J": job.raw_id,
        "x": job.name,
        "u": job.user,
        "%": "%",
    }

    def value(match: re.Match[str]) -> str:
        text = values[match[2]]
        return text.zfill(int(match[1])) if match[1] and text.isdigit() else text

    return Path(record.folder, re.sub(r"%(\d*)([AajJxu%])", value, record.log))


def _start_of_last(handle: int, num_lines: int) -> int:
    """Where the last lines of a file begin."""
    end = start = os.fstat(handle).st_size
    wanted = num_lines + 1  # line ends to pass, from the back; the last line's own is the first
    if end and os.pread(handle, 1, end - 1) != b"\n":
        wanted = num_lines
    if num_lines == 0:
        return end
    while start > 0:
        size = min(start, TAIL_BYTES)
        piece = os.pread(handle, size, start - size)
        while wanted and (at := piece.rfind(b"\n")) >= 0:
            wanted -= 1
            if not wanted:
                return start - size + at + 1
            piece = piece[:at]
        start -= size
    return 0
