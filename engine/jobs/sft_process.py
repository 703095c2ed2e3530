"""What `accelerate launch` starts: one process of an SFT run, from start to its exit code.

Everything that it and its libraries print goes to a log file of its own; to the command that
started it, it says a JSON object a line (`engine.jobs.sft_messages`). It ends when that command
does, however that ends.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Final

from engine.jobs.events import Event
from engine.jobs.sft_job import SftJob, read_job
from engine.jobs.sft_messages import (
    Busy,
    Done,
    Failed,
    Happened,
    Hello,
    Left,
    Message,
    Said,
    encode,
)
from engine.jobs.stopping import SIGNALS, Stopped, StopRequest
from proto.errors import Error
from proto.quick_start import quick_start

ORPHANED: Final = 3
# How torch's backends say that another process is gone.
LOST: Final = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "remote process exited",
    "socket timeout",
    "timed out waiting",
    "nccl communicator was aborted",
    "watchdog",
)


def main(arguments: list[str]) -> int:
    """Run one process; returns its exit code."""
    (job_file,) = arguments
    quick_start()
    rank = int(os.environ.get("RANK", "0"))
    log_file = Path(job_file).parent / f"process{rank}.log"
    tell = _open_channel(log_file)
    stop = _hear_signals()
    _end_with_the_command()
    tell(Hello(rank=rank, pid=os.getpid(), host=platform.node(), log_file=str(log_file)))
    try:
        return _run(read_job(Path(job_file)), rank, tell, stop)
    except Stopped as exc:
        # No failure to the launcher: it would kill the others while they write.
        tell(Left(sentence=str(exc)))
        return 0
    except Error as exc:
        traceback.print_exc()
        tell(Failed(rank=rank, sentence=str(exc), exit_code=exc.exit_code))
        return exc.exit_code
    except Exception as exc:
        traceback.print_exc()
        tell(_unforeseen(rank, exc))
        return 1


class _Channel:
    """A watcher for a process: what the first one has to say goes to the command."""

    def __init__(self, rank: int, tell: _Tell) -> None:
        self._tell = tell if rank == 0 else lambda _: None

    def busy(self, text: str) -> None:
        """Passed on."""
        self._tell(Busy(text=text))

    def say(self, line: str) -> None:
        """Passed on."""
        self._tell(Said(line=line))

    def event(self, event: Event) -> None:
        """Passed on."""
        self._tell(Happened(event=event))


class _Tell:
    """Write messages to the command; nobody is interrupted when it is gone."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __call__(self, message: Message) -> None:
        data = encode(message).encode()
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError:
            pass


def _run(job: SftJob, rank: int, tell: _Tell, stop: StopRequest) -> int:
    channel = _Channel(rank, tell)
    channel.busy("loading the libraries")
    from engine.jobs.sft import run_sft

    if job.num_processes > 1:
        channel.busy(f"waiting until all {job.num_processes} processes meet")
    result = run_sft(job, channel, stop)
    if result is not None:
        tell(Done(result=result.to_json()))
    return 0


def _open_channel(log_file: Path) -> _Tell:
    """Keep the launcher's standard output for messages, and send all printing to the log."""
    handle = os.dup(1)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return _Tell(handle)


def _hear_signals() -> StopRequest:
    """Remember the first one. A second changes nothing: Slurm signals this process and the
    command both, and the command passes its own on."""
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.signal_number is None:
            request.signal_number = number

    for number in SIGNALS:
        signal.signal(number, on_signal)
    # The command blocked them for the launcher, which must not end before we do.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return request


def _end_with_the_command() -> None:
    """Its end of our standard input closes when it is gone, killed or not."""

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        os._exit(ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _unforeseen(rank: int, exc: Exception) -> Failed:
    """An error of a library, in its first line."""
    text = str(exc).strip()
    said = " ".join(text.splitlines()[0].split()) if text else "no words"
    is_lost = any(words in text.lower() for words in LOST)
    return Failed(
        rank=rank,
        sentence=f"{type(exc).__name__}: {said[:300]}",
        exit_code=1,
        lost_others=is_lost,
    )


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of NCCL and gloo may not be waited for
