"""Real worker processes for tests: started, waited for with a deadline, and always ended."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]

READY = re.compile(
    r"ready (?P<address>\S+:\d+) section (?P<section>\d+/\d+|-/-) "
    r"layers (?P<start>\d+):(?P<end>\d+) of (?P<layers>\d+) "
    r"model (?P<model>.+) bytes (?P<bytes>\d+)"
)


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


class WorkerProcess:
    """`python -m worker ARGS` as a context manager, ready (or ended) when the block begins.

    with WorkerProcess("--sections", "2", "--index", "0", "--model", str(folder)) as worker:
        connect(worker.address)

    It listens on a free port of 127.0.0.1 unless ARGS say otherwise. With `wait=False` the block
    begins at once; call `wait_until_ready` later.
    """

    def __init__(
        self,
        *args: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        ready_timeout_s: float = 120.0,
        wait: bool = True,
    ) -> None:
        listen: Sequence[str] = () if "--listen" in args else ("--listen", "127.0.0.1:0")
        self.ready_line: str = ""
        self.said: str = ""  # all of stderr, once it is over
        self.address: str = ""
        self._ready_timeout_s = ready_timeout_s
        self._wait = wait
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - __exit__
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker", *args, *listen],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=cwd or tempfile.gettempdir(),
            env=clean_environment(env),
        )
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    def __enter__(self) -> WorkerProcess:
        try:
            if self._wait:
                self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.said = self.stderr
        self._stderr.close()
        self._reader.join(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def wait_until_ready(self) -> None:
        """Wait for the ready line; AssertionError with what the worker said if none comes."""
        try:
            line = self._lines.get(timeout=self._ready_timeout_s)
        except queue.Empty:
            raise AssertionError(f"no ready line in time; stderr:\n{self.stderr}") from None
        if line is None:
            code = self.process.wait(60)
            raise AssertionError(f"the worker ended with {code}; stderr:\n{self.stderr}")
        match = READY.fullmatch(line)
        assert match, f"not a ready line: {line!r}"
        self.ready_line, self.address = line, match["address"]

    def wait_for_stderr(self, words: str) -> str:
        """The first line there that has these words; AssertionError when none comes in time."""
        give_up_s = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < give_up_s:
            for line in self.stderr.splitlines(keepends=True):
                if words in line and line.endswith("\n"):
                    return line
            time.sleep(0.01)  # a file tells nobody that it grew
        raise AssertionError(f"no {words!r} in time; stderr:\n{self.stderr}")

    @property
    def stderr(self) -> str:
        """What the worker wrote there until now."""
        self._stderr.seek(0)
        return self._stderr.read()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def stop(self, timeout_s: float = 60.0) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as a power cut would end it; does nothing if it ended already."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


def run_worker(
    *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m worker ARGS` that is expected to end by itself."""
    # Of two words for it the last one counts; a free port, whatever else runs on this machine.
    return subprocess.run(
        [sys.executable, "-m", "worker", "--listen", "127.0.0.1:0", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd or tempfile.gettempdir(),
        env=clean_environment(env),
        check=False,
    )


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours; one thread, no model hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COMBOIO_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **(extra or {}),
    }
