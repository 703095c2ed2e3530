"""Start a launcher, follow what its processes say, and leave none of them behind.

The launcher never hears of signals: the processes are told to end, write their checkpoint, and it
ends after them. Whatever ends this command, they end too: each holds the other end of a pipe.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from engine.jobs.sft_messages import (
    Busy,
    Done,
    Failed,
    Happened,
    Hello,
    Left,
    Message,
    Said,
    decode,
)
from manager.finetune.sft_failures import Ended, explain, was_killed
from manager.finetune.sft_launch import Launch, command, config_text, environment
from proto.errors import Error, UsageError

if TYPE_CHECKING:
    from engine.jobs.job import Watcher
    from engine.jobs.stopping import StopRequest

POLL_S: Final = 0.2  # how soon a signal to this command is passed on
# After one process has failed, the others get so long to say what happened to them.
GRACE_S: Final = 2.0
# After one has left as it was asked to, the others get so long; all have their checkpoint by then.
LEAVE_S: Final = 10.0
KILL_AFTER_S: Final = 10.0  # a launcher whose processes are gone
PRINTED_BYTES: Final = 200_000  # of the launcher's log, looked at after a failure


class Run:
    """The processes of one machine."""

    def __init__(self, launch: Launch, watcher: Watcher, stop: StopRequest) -> None:
        self._launch, self._watcher, self._stop = launch, watcher, stop
        self._processes: dict[int, Hello] = {}
        self._failures: list[Failed] = []
        self._left: Left | None = None
        self._result: dict[str, Any] | None = None
        self._has_begun = False  # a first event of the training was told
        self._signalled: set[int] = set()
        self._kill_at_s: float | None = None  # processes that are left then
        self._pending = b""
        self._launcher: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    def follow(self) -> dict[str, Any] | None:
        """Run to the end.

        Returns:
            What the first process says of its result; None on other machines.
        Raises:
            Stopped: a signal came, here or on another machine.
            Error: see `explain`.
        """
        _write_files(self._launch)
        with self._started() as (launcher, log):
            self._read_all(launcher, log)
            exit_code = self._wait(launcher)
        return self._conclude(exit_code)

    # --- while it runs ------------------------------------------------------------------------

    @contextmanager
    def _started(self) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        from engine.jobs.stopping import SIGNALS

        log = _open_log(self._launch.log_file)
        self._log_start = log.tell()
        with log:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited, and kept
            try:
                launcher = subprocess.Popen(
                    command(self._launch),
                    stdin=subprocess.PIPE,  # never written to: its end is what counts
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(self._launch, os.environ),
                    start_new_session=True,  # Ctrl-C is passed on by this command
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._launcher = launcher
            try:
                yield launcher, log
            finally:
                self._kill()
                assert launcher.stdin is not None and launcher.stdout is not None
                launcher.stdin.close()
                launcher.stdout.close()
                launcher.wait()

    def _read_all(self, launcher: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        """Until nobody holds the other end of the pipe any more."""
        assert launcher.stdout is not None
        handle = launcher.stdout.fileno()
        while True:
            ready, _, _ = select.select([handle], [], [], POLL_S)
            if ready:
                data = os.read(handle, 65536)
                if not data:
                    return
                self._take(data, log)
            elif launcher.poll() is not None:
                return  # a process it left behind may hold the pipe
            self._pass_on_signals()
            if self._kill_at_s is not None and time.monotonic() > self._kill_at_s:
                self._kill_processes()
                self._kill_at_s = None

    def _take(self, data: bytes, log: IO[bytes]) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            message = decode(line.decode("utf-8", "replace"))
            if message is None:
                log.write(line + b"\n")
                log.flush()
            else:
                self._hear(message)

    def _hear(self, message: Message) -> None:
        match message:
            case Hello():
                self._processes[message.rank] = message
            case Busy():
                self._watcher.busy(message.text)
            case Said():
                self._watcher.say(message.line)
            case Happened():
                self._has_begun = True
                self._watcher.event(message.event)
            case Failed():
                self._failures.append(message)
                self._kill_at_s = self._kill_at_s or time.monotonic() + GRACE_S
            case Left():
                self._left = self._left or message
                self._kill_at_s = self._kill_at_s or time.monotonic() + LEAVE_S
            case Done():
                self._result = message.result

    def _pass_on_signals(self) -> None:
        if not self._stop.is_made:
            return
        if not self._processes:
            self._kill()  # nothing has begun
        for hello in self._processes.values():
            if hello.pid not in self._signalled:
                self._signalled.add(hello.pid)
                _signal(hello.pid, signal.SIGTERM)

    def _wait(self, launcher: subprocess.Popen[bytes]) -> int:
        try:
            return launcher.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return launcher.wait()

    def _kill(self) -> None:
        """The launcher, and its processes after it, which nobody would end otherwise."""
        assert self._launcher is not None
        if self._launcher.poll() is None:
            self._kill_processes()
            _signal(self._launcher.pid, signal.SIGKILL)

    def _kill_processes(self) -> None:
        """Only while the launcher lives: it has not reaped them, so their numbers are theirs."""
        for hello in self._processes.values():
            _signal(hello.pid, signal.SIGKILL)

    # --- afterwards ---------------------------------------------------------------------------

    def _conclude(self, exit_code: int) -> dict[str, Any] | None:
        from engine.jobs.stopping import Stopped

        ended = Ended(
            launch=self._launch,
            exit_code=exit_code,
            printed=_tail(self._launch.log_file, self._log_start),
            processes=self._processes,
            failures=self._failures,
        )
        if self._left is not None:
            raise Stopped(self._left.sentence, self._stop.signal_number or signal.SIGTERM)
        # A process that was killed fails those on other machines, whose end has this command told
        # to stop: what ended the run is the process then, not the signal.
        if self._stop.is_made and self._result is None and not was_killed(ended):
            what = "its checkpoint was written" if self._has_begun else "training began"
            raise Stopped(f"stopped before {what}", self._stop.signal_number or signal.SIGTERM)
        if exit_code == 0 and not self._failures:
            return self._result
        raise explain(ended)


def _write_files(launch: Launch) -> None:
    try:
        launch.folder.mkdir(parents=True, exist_ok=True)
        said = json.dumps(launch.job.to_json(), indent=2, ensure_ascii=False)
        launch.job_file.write_text(f"{said}\n", encoding="utf-8")
        launch.config_file.write_text(config_text(launch), encoding="utf-8")
    except OSError as exc:
        raise UsageError(
            f"--save-dir: {launch.folder} cannot be written ({exc.strerror}): name a folder that "
            "you may write to."
        ) from exc


def _open_log(path: Path) -> IO[bytes]:
    try:
        log = path.open("ab")
        log.seek(0, os.SEEK_END)
    except OSError as exc:
        raise Error(f"{path} cannot be written: {exc.strerror}.") from exc
    return log


def _tail(path: Path, start: int) -> str:
    """What a log got in this run, its end if it is much."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - PRINTED_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # gone
