"""Real llama-server processes for tests: started, waited for with a deadline, and always ended."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from tests.support.llama_cpp import SERVER, llama_cpp_dir

DEADLINE_S = 120.0


class LlamaServer:
    """`llama-server -m MODEL WORDS` on a free port of 127.0.0.1; ready when the block begins.

    With `wait=False` the block begins at once; call `wait_for_health` later.
    """

    def __init__(
        self, model: Path, *words: str, port: int | None = None, wait: bool = True
    ) -> None:
        folder = llama_cpp_dir()
        assert folder is not None
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._wait = wait
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        libraries = [str(folder.parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        self.process = subprocess.Popen(
            [
                *(str(folder / SERVER), "-m", str(model), "--port", str(self.port)),
                *("-t", "1", "--offline", "--no-webui", "--cache-ram", "0"),
                # As exact as our own: two programs then agree on which token is likeliest.
                *("-ctk", "f32", "-ctv", "f32", *words),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))},
        )

    def __enter__(self) -> LlamaServer:
        try:
            if self._wait:
                self.wait_for_health(200)
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
        self._log.close()

    def wait_for_health(self, status: int) -> None:
        """Until /health answers so: 503 while it loads, 200 when it has."""
        give_up_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < give_up_s:
            if self._health() == status:
                return
            assert self.process.poll() is None, self.said
            time.sleep(0.005)  # nobody tells when a port opens
        raise AssertionError(f"/health was not {status} in time; it said:\n{self.said}")

    @property
    def said(self) -> str:
        """Its log."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def pause(self) -> None:
        """Stop it, as a network that swallows everything would; `kill` ends it all the same."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it; does nothing if it ended already."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)

    def _health(self) -> int | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request("GET", "/health", headers={"Connection": "close"})
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
