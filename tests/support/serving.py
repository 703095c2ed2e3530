"""A real `manager serve` in a process of its own, and plain HTTP to call it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.support.processes import ROOT, clean_environment

DEADLINE_S = 90.0
READY = re.compile(r"ready (?P<url>http://\S+) model (?P<model>.+)")


@dataclass(frozen=True)
class Got:
    """An answer of the server."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of an error in OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["message"])

    @property
    def events(self) -> list[Any]:
        """Of a stream; it ended as it should."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


class Server:
    """`manager serve ARGS` as a context manager, ready when the block begins."""

    def __init__(self, *args: str, wait: bool = True, env: dict[str, str] | None = None) -> None:
        self._args, self._wait, self._env = args, wait, env
        self.url = self.model = ""

    def __enter__(self) -> Server:
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "manager", "serve", "--port", "0", *self._args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=ROOT / "tests",
            env=clean_environment(self._env),
        )
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
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._stderr.close()

    def wait_until_ready(self) -> None:
        """Wait for the ready line."""
        assert self.process.stdout is not None
        late = threading.Timer(DEADLINE_S, self.process.kill)
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        match = READY.fullmatch(line.rstrip("\n"))
        assert match, f"not a ready line: {line!r}; stderr:\n{self.stderr}"
        self.url, self.model = match["url"], match["model"]

    @property
    def stderr(self) -> str:
        """What it wrote there until now."""
        self._stderr.seek(0)
        return self._stderr.read()

    def said(self, words: str) -> str:
        """The first line of stderr with these words, once it is there."""
        return until(
            lambda: next((line for line in self.stderr.splitlines() if words in line), None)
        )

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def get(self, path: str, **headers: str) -> Got:
        return self.call(path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Got:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.call(path, data, **headers)

    def call(self, path: str, data: bytes | None, **headers: str) -> Got:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data=data, headers=named)
        if data is not None:
            request.add_header("content-type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
                return Got(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as refused:
            with refused:
                return Got(refused.code, refused.headers, refused.read())

    def metric(self, name: str) -> float:
        """The value of one series of /metrics, its labels included in `name`."""
        text = self.get("/metrics").body.decode()
        found = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert len(found) == 1, f"{name}: {found}"
        return float(found[0].split()[-1])


def until(condition: Any, deadline_s: float = DEADLINE_S) -> Any:
    """What the condition gives once it gives something; AssertionError when it never does."""
    give_up_s = time.monotonic() + deadline_s
    while time.monotonic() < give_up_s:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
