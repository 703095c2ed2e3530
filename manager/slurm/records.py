"""What was submitted from here, in a small file that outlives Slurm's own memory of it.

Slurm forgets a job minutes after its end where it keeps no accounts. The file has a JSON object a
line: a submission, or how one ended. Lines are only ever added, under a lock, each in one write;
a line that a crash cut short is passed over. Knows no command of Slurm.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from proto.errors import JobError

FILE_VARIABLE: Final = "COMBOIO_JOBS_FILE"
FILE: Final = Path("comboio", "jobs.jsonl")  # below XDG_STATE_HOME
STATE_HOME: Final = Path("~", ".local", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job that was submitted from here."""

    job_id: str  # as sbatch printed it; an array has one record
    cluster: str  # ids are unique within it; empty where it has no name
    backend: str
    name: str
    submitted_at: float  # unix seconds
    folder: str  # where the job keeps its files
    log: str  # may have %j, %A, %a and %x in it, as --output of sbatch
    command: tuple[str, ...]  # of `manager`, as it was typed
    state: str | None = None  # the last one, once it is over
    exit_code: int | None = None
    ended_at: float | None = None  # unix seconds

    def __str__(self) -> str:
        return f"job {self.job_id} ({self.name})"

    @property
    def command_line(self) -> str:
        return shlex.join(self.command)


class Records:
    """The records in one file, which need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def default(cls, environ: Mapping[str, str]) -> Records:
        """Those of this user: $COMBOIO_JOBS_FILE, else comboio/jobs.jsonl in XDG_STATE_HOME."""
        named = environ.get(FILE_VARIABLE)
        if named:
            return cls(Path(named).expanduser())
        state = environ.get("XDG_STATE_HOME", "")
        home = Path(state) if Path(state).is_absolute() else STATE_HOME.expanduser()
        return cls(home / FILE)

    def add(self, record: JobRecord) -> None:
        """Note a submission.

        Raises:
            JobError: the file cannot be written; it is as it was.
        """
        self._append({"submitted": asdict(record)})

    def settle(
        self,
        job_id: str,
        state: str,
        exit_code: int | None = None,
        ended_at: float | None = None,
        *,
        cluster: str | None = None,
    ) -> None:
        """Note how a job ended, of this cluster or of any.

        Raises:
            JobError: the file cannot be written; it is as it was.
        """
        end = {"state": state, "exit_code": exit_code, "ended_at": ended_at}
        self._append({"ended": {"job_id": job_id, "cluster": cluster, **end}})

    def all(self, cluster: str | None = None) -> tuple[JobRecord, ...]:
        """Every record in the order of submission; None: of all clusters.

        Raises:
            JobError: there is a file, and it cannot be read.
        """
        records: dict[tuple[str, str], JobRecord] = {}
        for line in self._lines():
            if (record := _record(line.get("submitted"))) is not None:
                key = record.cluster, record.job_id
                records.pop(key, None)  # a cluster that began to count anew
                records[key] = record
            elif isinstance(end := line.get("ended"), dict):
                _settle(records, end)
        return tuple(it for it in records.values() if cluster is None or it.cluster == cluster)

    def find(self, job: str, cluster: str | None = None) -> JobRecord | None:
        """The latest record with this id, or, where none has it, with this name.

        Raises:
            JobError: there is a file, and it cannot be read.
        """
        records = self.all(cluster)[::-1]
        by_id = (it for it in records if it.job_id == job)
        by_name = (it for it in records if it.name == job)
        return next(by_id, None) or next(by_name, None)

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as exc:
            raise JobError(
                f"cannot read the records of jobs in {self.path}: {exc.strerror}; mend that, or "
                f"set {FILE_VARIABLE} to another file."
            ) from exc
        for line in content.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue  # cut short by a crash or a full disk
            if isinstance(said, dict):
                yield said

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line) + "\n"
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A command may quote a prompt: it is nobody else's business.
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                with _locked(handle):
                    _write_line(handle, text.encode("ascii"))
            finally:
                os.close(handle)
        except OSError as exc:
            is_file = isinstance(exc, FileExistsError)
            why = f"{self.path.parent} is not a folder" if is_file else exc.strerror
            raise JobError(
                f"cannot write the record of a job to {self.path}: {why}; mend that, or "
                f"set {FILE_VARIABLE} to a file that can be written."
            ) from exc


def _settle(records: dict[tuple[str, str], JobRecord], end: dict[str, Any]) -> None:
    job_id, cluster, state = end.get("job_id"), end.get("cluster"), end.get("state")
    if not isinstance(state, str):
        return
    for key in reversed(records):
        if key[1] == job_id and cluster in (None, key[0]):
            records[key] = replace(
                records[key],
                state=state,
                exit_code=end.get("exit_code"),
                ended_at=end.get("ended_at"),
            )
            return


def _record(told: object) -> JobRecord | None:
    """A record of this or of a later version; None if it is none."""
    if not isinstance(told, dict):
        return None
    known = {it.name for it in fields(JobRecord)}
    values = {name: value for name, value in told.items() if name in known}
    values["command"] = tuple(values.get("command") or ())
    try:
        return JobRecord(**values)
    except TypeError:
        return None


@contextmanager
def _locked(handle: int) -> Iterator[None]:
    """Alone with the file, where its file system has locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        # Some shared file systems are mounted without locks. One write at the end of the file is
        # all that follows, so that two managers at the same instant are safe in practice.
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


def _write_line(handle: int, line: bytes) -> None:
    """Write it whole, on a line of its own, or leave the file as it was."""
    before = os.fstat(handle).st_size
    if before and os.pread(handle, 1, before - 1) != b"\n":
        line = b"\n" + line  # somebody else's line was cut short
    try:
        written = 0
        while written < len(line):
            written += os.write(handle, line[written:])
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, before)
        raise
