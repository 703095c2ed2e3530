"""Start the ranks of a run on this machine; this process is the first of them.

The others are told on their standard input what to do, and where this one is; that it closes tells
them that this one is gone before they met. Afterwards `manager.finetune.ranks_watch` knows.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from engine.jobs.settings import JobSettings
from manager.finetune.ranks_launch import Launch
from manager.finetune.ranks_link import LostError
from manager.finetune.ranks_place import LOOPBACK, Place, bind
from manager.finetune.ranks_running import run_rank
from manager.worker_process import with_this_installation
from proto.errors import Error

if TYPE_CHECKING:
    from manager.finetune.ranks_running import TeamWork

LAUNCHER: Final = "this command"

Others = Sequence["subprocess.Popen[bytes]"]


def run_here(work: TeamWork, settings: JobSettings, num_ranks: int, *, as_json: bool) -> None:
    """Run all ranks of a LoRA job to their end.

    Args:
        work: the first rank's; the others find theirs by the settings' method.
    Raises:
        Interrupted, Error: as `run_rank`; none of the others is left.
    """
    listener = bind(LOOPBACK, 0)
    place = Place(LOOPBACK, [listener.getsockname()[1]], secrets.token_hex(16), listener)
    first = Launch(launcher=LAUNCHER, num_ranks=num_ranks)
    with _others(settings, place, num_ranks) as others:
        run_rank(work, settings, first, place, as_json=as_json, check=lambda: _check(others))


@contextmanager
def _others(settings: JobSettings, place: Place, num_ranks: int) -> Iterator[Others]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, num_ranks):
            started.append(_start())
            said = {
                "settings": settings.to_json(),
                "port": place.ports[0],
                "token": place.token,
                "rank": rank,
                "num_ranks": num_ranks,
            }
            _tell(started[-1], said)
        yield started
    finally:
        for process in started:
            _end(process)


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "manager.finetune.ranks_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=with_this_installation(os.environ),
            start_new_session=True,  # Ctrl-C is for this process, which tells the others
        )
    except OSError as exc:
        raise Error(f"a process for another rank cannot be started: {exc.strerror}") from exc


def _tell(process: subprocess.Popen[bytes], said: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(said).encode() + b"\n")
        process.stdin.flush()
    except OSError:
        pass  # it is gone, which `_check` says


def _check(others: Others) -> None:
    """Whether all that are waited for are still there."""
    for rank, process in enumerate(others, start=1):
        code = process.poll()
        if code is not None:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise LostError(
                f"rank {rank} (process {process.pid}) ended before the ranks met ({how}): see what "
                "it wrote above; a kernel that ran out of memory kills so"
            )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever became of the run: the first rank alone writes files, and is done here."""
    assert process.stdin is not None
    process.kill()
    process.wait()
    with suppress(OSError):
        process.stdin.close()
