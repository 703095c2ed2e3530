"""Real worker processes that start in a moment: forked from a process that has torch already.

A worker spends seconds on importing torch; tests that kill workers by the dozen cannot. The
nursery is a process that imports what a worker imports, computes nothing, and forks when told to:
the child runs `worker`'s own command line, in a process of its own, and can be killed, stopped and
started again as any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from tests.support.processes import READY, ROOT, clean_environment

READY_TIMEOUT_S = 120.0  # on a machine that does much else


class Nursery:
    """Starts workers; all of them end with the block."""

    def __enter__(self) -> Nursery:
        self._folder = tempfile.TemporaryDirectory(prefix="comboio-nursery-")
        self._workers: list[ForkedWorker] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # the nursery kills those that are left, and ends
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()

    def start(self, *words: str, wait: bool = True) -> ForkedWorker:
        """Start `worker WORDS`, on a free port of 127.0.0.1 unless WORDS say otherwise."""
        if "--listen" not in words:
            words = (*words, "--listen", "127.0.0.1:0")
        output = Path(self._folder.name) / f"worker-{len(self._workers)}"
        output.with_suffix(".out").touch()
        output.with_suffix(".err").touch()
        pid = int(self.ask({"start": words, "output": str(output)}))
        worker = ForkedWorker(self, pid, words, output)
        self._workers.append(worker)
        if wait:
            worker.wait_until_ready()
        return worker

    def ask(self, question: dict[str, object]) -> str:
        """Say one line to the nursery; its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


class ForkedWorker:
    """One of its workers."""

    def __init__(self, nursery: Nursery, pid: int, words: tuple[str, ...], output: Path) -> None:
        self.pid, self.words = pid, words
        self.address = ""
        self._nursery, self._output = nursery, output

    @property
    def stderr(self) -> str:
        """What it wrote there until now."""
        return self._output.with_suffix(".err").read_text(encoding="utf-8")

    def wait_until_ready(self) -> None:
        """Wait for the ready line; AssertionError with what the worker said if none comes."""
        give_up_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < give_up_s:
            ready = READY.match(self._output.with_suffix(".out").read_text(encoding="utf-8"))
            if ready:
                self.address = ready["address"]
                return
            time.sleep(0.005)  # a file tells nobody that it grew
        raise AssertionError(f"no ready line in time; stderr:\n{self.stderr}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, as a power cut would end it; returns once it is gone. Twice does no harm."""
        self._nursery.ask({"kill": self.pid})

    def start_again(self, *, wait: bool = True) -> ForkedWorker:
        """Another worker of the same command line at the same address, as a supervisor does it."""
        at = self.words.index("--listen") + 1
        words = (*self.words[:at], self.address, *self.words[at + 1 :])
        worker = self._nursery.start(*words, wait=False)
        worker.address = self.address
        if wait:
            worker.wait_until_ready()
        return worker


def _main() -> None:
    """The nursery: one question a line on stdin, one answer a line on stdout."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    import engine.stage
    import worker.server
    import worker.service

    assert torch and transformers and modeling_llama and engine and worker
    alive: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _become_worker(question["start"], Path(question["output"]))
            alive.add(pid)
            print(pid, flush=True)
        else:
            _end(question["kill"], alive)
            print("gone", flush=True)
    for pid in tuple(alive):
        _end(pid, alive)


def _end(pid: int, alive: set[int]) -> None:
    if pid in alive:
        alive.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become_worker(words: list[str], output: Path) -> None:
    from worker.cli import main

    for number, path in ((1, output.with_suffix(".out")), (2, output.with_suffix(".err"))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    try:
        main(words)
    except SystemExit as left:
        sys.stdout.flush()
        os._exit(int(left.code or 0))
    os._exit(1)


if __name__ == "__main__":
    _main()
