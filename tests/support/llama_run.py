"""`manager llama-server run` as a process of its own, with the real binaries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.llama_cpp import llama_cpp_dir
from tests.support.processes import ROOT, Answer, clean_environment

DEADLINE_S = 120.0
POLL_S = 0.005
# llama.cpp's threads spin: on a busy machine two of them are many times slower than one.
THREADS = ("--threads", "1")


class LlamaRun:
    """The command, running. A context manager; nothing that it started may outlive it."""

    def __init__(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__
        self._err = tempfile.TemporaryFile()  # noqa: SIM115 - __exit__
        self._seen: dict[int, psutil.Process] = {}
        binaries = {"LLAMA_CPP_DIR": str(llama_cpp_dir() or "")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "manager", "llama-server", "run", *THREADS, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            cwd=cwd or ROOT / "tests",
            env=clean_environment({**binaries, **(env or {})}),
        )

    def __enter__(self) -> LlamaRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        children = self.children()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        for child in children:
            if child.is_running():
                child.kill()
        self._out.close()
        self._err.close()

    @property
    def stdout(self) -> str:
        """Until now."""
        return _read(self._out)

    @property
    def stderr(self) -> str:
        """Until now."""
        return _read(self._err)

    def children(self, name: str = "") -> list[psutil.Process]:
        """What it has started and runs; with a name, those whose program ends in it."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self._seen.update({child.pid: child for child in found})
        return [child for child in found if _program(child).endswith(name)]

    def wait_for(self, holds: Callable[[], bool], what: str) -> None:
        """Until this holds; AssertionError when it does not in time, or the command has ended."""
        give_up_s = time.monotonic() + DEADLINE_S
        while not holds():
            ended = self.process.poll()
            assert ended is None or holds(), f"{what}: ended with {ended}: {self.stderr}"
            assert time.monotonic() < give_up_s, f"{what}: not in time: {self.stderr}"
            time.sleep(POLL_S)  # a file tells nobody that it grew

    def wait_for_stderr(self, words: str, *, times: int = 1) -> None:
        """Until it has said this so often."""
        self.wait_for(lambda: self.stderr.count(words) >= times, f"{words!r} on stderr")

    def wait_for_stdout(self, words: str) -> None:
        """Until it has printed this."""
        self.wait_for(lambda: words in self.stdout, f"{words!r} on stdout")

    def kill_rpc_server(self, index: int = 0) -> None:
        """SIGKILL one of its rpc-servers, and wait until it is gone."""
        victim = self.children("rpc-server")[index]
        victim.send_signal(signal.SIGKILL)
        self.wait_for(lambda: not _runs(victim), "the end of the rpc-server")

    def send(self, number: signal.Signals) -> None:
        """Signal the command itself."""
        self.children()  # to know them afterwards
        self.process.send_signal(number)

    def wait(self) -> Answer:
        """Its end; AssertionError where anything that was seen of it lives on."""
        give_up_s = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < give_up_s, f"it does not end: {self.stderr}"
            self.children()
            time.sleep(POLL_S)
        left = [child for child in self._seen.values() if _runs(child)]
        assert not left, f"left behind: {left}"
        return Answer(self.process.returncode, self.stdout, self.stderr)


def llama_run(*words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Answer:
    """The command, to its end."""
    with LlamaRun(*words, env=env, cwd=cwd) as running:
        return running.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _program(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return os.path.basename(words[0]) if words else ""


def _read(file: object) -> str:
    # pread: the position belongs to whoever writes.
    descriptor = file.fileno()  # type: ignore[attr-defined]
    return os.pread(descriptor, 10**8, 0).decode("utf-8", "replace")
