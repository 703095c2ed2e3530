"""Calls a server of ours from a terminal: streams of events over plain HTTP.

Knows HTTP and OpenAI's events, no pipeline; needs nothing but the standard library.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from proto.errors import Error, UsageError
from proto.secret import read_secret_file

DEFAULT_URL: Final = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 600.0  # a long prompt on small boards takes its time
KEY_VARIABLE: Final = "OPENAI_API_KEY"


class ApiClient:
    """One server, and the key that it wants."""

    def __init__(self, url: str, api_key_file: Path | None) -> None:
        """
        Raises:
            UsageError: the URL is none, or the key cannot be read.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as exc:
            raise UsageError(f"--server {url}: {exc}.") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--server {url} is no address: write http://HOST:PORT.")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname, port
        key = None
        if api_key_file is not None:
            key = read_secret_file(api_key_file).decode("ascii", "replace").split()[0]
        key = key or os.environ.get(KEY_VARIABLE)
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"

    async def get(self, path: str) -> Any:
        """The JSON of an answer.

        Raises:
            Error: the server is not there, or refuses.
        """
        return await asyncio.to_thread(self._get, path)

    async def events(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[Any, None]:
        """Each event of a stream; leaving early closes the connection.

        Raises:
            Error: the server is not there, refuses, or goes away.
        """
        connection, answer = await asyncio.to_thread(self._open, path, body)
        link = connection.sock
        try:
            while line := await asyncio.to_thread(self._line, answer):
                if line.startswith(b"data: "):
                    if line.strip() == b"data: [DONE]":
                        return
                    yield json.loads(line[6:])
        finally:
            # A thread may still wait for a line: it gets the end of the stream.
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            connection.close()

    # --- on a thread -------------------------------------------------------------------------

    def _get(self, path: str) -> Any:
        connection, answer = self._open(path, None)
        try:
            return json.loads(answer.read())
        except (OSError, HTTPException, ValueError) as exc:
            raise self._gone(exc) from exc
        finally:
            connection.close()

    def _open(self, path: str, body: Mapping[str, Any] | None) -> tuple[HTTPConnection, Any]:
        kind = HTTPSConnection if self._is_tls else HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(SILENCE_S)
            method = "GET" if body is None else "POST"
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, self._headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as exc:
            connection.close()
            raise self._gone(exc) from exc
        if answer.status >= 400:
            said = answer.read()
            connection.close()
            raise Error(_sentence(said, answer.status, self.url))
        return connection, answer

    def _line(self, answer: Any) -> bytes:
        try:
            return bytes(answer.readline())
        except (OSError, HTTPException, ValueError, AttributeError) as exc:
            raise self._gone(exc) from exc

    def _gone(self, exc: Exception) -> Error:
        why = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
        return Error(
            f"no server answers at {self.url} ({why.lower()}): start one with `manager serve`, or "
            "pass its address as --server URL."
        )


def _sentence(said: bytes, status: int, url: str) -> str:
    try:
        return str(json.loads(said)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {status}."
