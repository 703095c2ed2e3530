"""Real worker processes that start in a moment: forked from a process that has torch already.

A worker spends seconds on importing torch; tests that kill workers by the dozen cannot. The
nursery is a process that imports what a worker imports, computes nothing, and forks when told to:
the child runs `worker`'s own command line, in a process of its own, and can be killed, stopped and
started again as any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

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

    def start(self, *words: str, wait: bool = True, gate: Path | None = None) -> ForkedWorker:
        """Start `worker WORDS`, on a free port of 127.0.0.1 unless WORDS say otherwise.

        Args:
            gate: before each step, torch's thread waits until nobody holds this file's lock.
        """
        if "--listen" not in words:
            words = (*words, "--listen", "127.0.0.1:0")
        output = Path(self._folder.name) / f"worker-{len(self._workers)}"
        output.with_suffix(".out").touch()
        output.with_suffix(".err").touch()
        behind = None if gate is None else str(gate)
        pid = int(self.ask({"start": words, "output": str(output), "gate": behind}))
        worker = ForkedWorker(self, pid, words, output, gate)
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


class Gate:
    """A file whose lock holds up the workers behind it: a step lasts until the gate is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w")

    def close(self) -> None:
        """Let no further step begin; returns once that is so."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def open(self) -> None:
        """Let all go on."""
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def remove(self) -> None:
        """For good."""
        self._file.close()


class ForkedWorker:
    """One of its workers."""

    def __init__(
        self,
        nursery: Nursery,
        pid: int,
        words: tuple[str, ...],
        output: Path,
        gate: Path | None = None,
    ) -> None:
        self.pid, self.words = pid, words
        self.address = ""
        self._nursery, self._output, self._gate = nursery, output, gate

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

    def wait(self) -> int:
        """Until it ends by itself, or for a signal; the exit code."""
        return int(self._nursery.ask({"wait": self.pid}))

    def start_again(self, *, wait: bool = True) -> ForkedWorker:
        """Another worker of the same command line at the same address, as a supervisor does it."""
        at = self.words.index("--listen") + 1
        words = (*self.words[:at], self.address, *self.words[at + 1 :])
        worker = self._nursery.start(*words, wait=False, gate=self._gate)
        worker.address = self.address
        if wait:
            worker.wait_until_ready()
        return worker


def _main() -> None:
    """The nursery: one question a line on stdin, one answer a line on stdout."""
    import torch

    import engine.stage_loading
    import worker.server
    import worker.service
    from engine import lean_imports
    from worker.cli import NOT_NEEDED

    lean_imports.allow(*NOT_NEEDED)
    lean_imports.prepare()
    from transformers.models.llama import modeling_llama

    assert torch and modeling_llama and engine and worker
    alive: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                _become_worker(question["start"], Path(question["output"]), question["gate"])
            alive.add(pid)
            print(pid, flush=True)
        elif "wait" in question:
            alive.discard(question["wait"])
            _, status = os.waitpid(question["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
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


def _become_worker(words: list[str], output: Path, gate: str | None) -> None:
    from worker.cli import main

    if gate is not None:
        _put_behind(gate)

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


def _put_behind(gate: str) -> None:
    """Have every stage of this process wait for the file's lock before it computes a step."""
    from worker import server

    load = server.load_from_checkpoint

    def load_behind_gate(*args: Any) -> Any:
        stage: Any = load(*args)
        forward = stage.forward

        def wait_and_forward(*inputs: Any) -> Any:
            with open(gate) as file:
                fcntl.flock(file, fcntl.LOCK_SH)
            return forward(*inputs)

        stage.forward = wait_and_forward
        return stage

    server.load_from_checkpoint = load_behind_gate


if __name__ == "__main__":
    _main()
