"""Where the tasks of one job tell one another who they are and how they fare.

A folder on the shared file system, with one small file a task, replaced as a whole each time, and
one that says that the first task is done. Whoever waits lists the folder: on network file systems
that asks the server, where looking for a file by name may answer from a cache for a minute.
Knows no worker and no server; what a task publishes is its own affair.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from manager.tasks.slurm_task import SlurmTask
from proto.errors import Error

POLL_S: Final = 0.2
END_POLL_S: Final = 0.5
END_FILE: Final = "end"


class TaskState(Enum):
    """How far a task is."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # what it runs died; it is started once more
    FAILED = "failed"  # for good; `detail` says why


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskNote:
    """What a task says of itself."""

    rank: int
    node: str
    state: TaskState
    address: str = ""  # HOST:PORT, once it is ready
    generation: int = 0  # how often what it runs was started anew
    detail: str = ""  # in words: how far it has loaded, or why it failed
    facts: Mapping[str, str] | None = None  # whatever else the first task wants to know


class Rendezvous:
    """The folder of one step of one run of a job."""

    def __init__(self, job_folder: Path, task: SlurmTask) -> None:
        # A job that was put back into the queue must not find what its first run said.
        self.folder: Final = job_folder / f"run-{task.restart}.{task.step_id}"
        self._task = task
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as exc:
            raise Error(
                f"{task.node} cannot write {job_folder}: {exc.strerror}; name a folder with "
                "--jobs-folder that every node may write."
            ) from exc

    def publish(self, note: TaskNote) -> None:
        """Say how this task fares.

        Raises:
            Error: the folder cannot be written.
        """
        self._write(f"task-{note.rank}.json", asdict(note) | {"state": note.state.value})

    def publish_end(self) -> None:
        """Say that the first task is done, so that the others may go."""
        self._write(END_FILE, {"ended_at": time.time()})

    def notes(self) -> dict[int, TaskNote]:
        """What the tasks said last, by rank."""
        found = {}
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("task-") and name.endswith(".json"):
                note = _read(self.folder / name)
                if note is not None:
                    found[note.rank] = note
        return found

    async def changes(self) -> AsyncIterator[dict[int, TaskNote]]:
        """The notes, now and as often as they are looked at; the caller decides when to stop."""
        while True:
            yield self.notes()
            await asyncio.sleep(POLL_S)

    async def until_end(self) -> None:
        """Wait for `publish_end`."""
        while END_FILE not in os.listdir(self.folder):  # noqa: ASYNC110 - another node writes it
            await asyncio.sleep(END_POLL_S)

    def _write(self, name: str, values: Mapping[str, object]) -> None:
        writing = self.folder / f".{name}.{self._task.rank}"
        try:
            writing.write_text(json.dumps(values), encoding="utf-8")
            writing.replace(self.folder / name)
        except OSError as exc:
            raise Error(f"cannot write {self.folder / name}: {exc.strerror}") from exc


def failure(notes: Mapping[int, TaskNote], what: str) -> Error | None:
    """The first task that failed for good, in a sentence.

    Args:
        what: a task's name in sentences, as "section".
    """
    for rank in sorted(notes):
        note = notes[rank]
        if note.state is TaskState.FAILED:
            return Error(f"{what} {rank} on {note.node}: {note.detail}")
    return None


def missing(notes: Mapping[int, TaskNote], num_tasks: int) -> Sequence[int]:
    """Ranks that are not ready."""
    return [
        rank
        for rank in range(num_tasks)
        if rank not in notes or notes[rank].state is not TaskState.READY
    ]


def _read(path: Path) -> TaskNote | None:
    """One file; None where it is just being replaced, or is none of ours."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TaskNote(**values | {"state": TaskState(values["state"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
