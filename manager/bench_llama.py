"""A llama-server as a contestant: prompts as token ids to /completion, tokens as they come.

Plain HTTP over asyncio, next to no work of this process: what is measured is the server. Prompts
are not taken from its cache, and its sampler only takes the likeliest token.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Final
from urllib.parse import urlsplit

from manager.bench_streams import Prompts, Run
from proto.errors import Error

ANSWER_S: Final = 30.0  # to a question about the server itself
SILENCE_S: Final = 600.0  # between two tokens; then it hangs
MAX_LINE_BYTES: Final = 2**20


class LlamaContestant:
    """One llama-server that is ready."""

    def __init__(self, url: str, name: str = "llama.cpp", *, api_key: str | None = None) -> None:
        """
        Args:
            url: as `manager.llama_server.server_url.parse_server` gives it.
        """
        self._url, self._name, self._api_key = url, name, api_key
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise Error(f"{url} cannot be measured: it takes a server of http://HOST:PORT.")
        self._host, self._port = parts.hostname, parts.port or 80
        self._base = parts.path.rstrip("/")

    @property
    def name(self) -> str:
        """For tables."""
        return self._name

    async def generate(self, prompts: Prompts, new_tokens: int) -> Run:
        """As `manager.bench_streams.Contestant`."""
        begun_s = time.monotonic()
        try:
            times = await asyncio.gather(
                *(self._stream(prompt, new_tokens, begun_s) for prompt in prompts)
            )
        except (OSError, asyncio.IncompleteReadError) as exc:
            raise Error(f"the llama-server at {self._url} was lost: {exc}") from exc
        except TimeoutError as exc:
            raise Error(
                f"the llama-server at {self._url} said nothing for {SILENCE_S:g} s"
            ) from exc
        return Run(len(prompts[0]), tuple(times))

    async def vocab_size(self) -> int:
        """How many token ids its model knows.

        Raises:
            Error: it does not answer, or does not say.
        """
        reader, writer = None, None
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                writer.write(self._head("GET", f"{self._base}/v1/models", b""))
                said = await reader.read(MAX_LINE_BYTES)
                while piece := await reader.read(MAX_LINE_BYTES):
                    said += piece
        except (OSError, TimeoutError) as exc:
            raise Error(f"no llama-server answers at {self._url}: {exc or 'too late'}") from exc
        finally:
            if writer is not None:
                writer.close()
        try:
            found = json.loads(said.partition(b"\r\n\r\n")[2])
            return int(found["data"][0]["meta"]["n_vocab"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise Error(
                f"{self._url} does not say how many tokens its model knows: it is no llama-server, "
                "its model is not loaded yet, or it wants an --api-key-file"
            ) from None

    async def _stream(self, prompt: Any, new_tokens: int, begun_s: float) -> tuple[float, ...]:
        """When each token came."""
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=MAX_LINE_BYTES)
        try:
            writer.write(self._request(prompt, new_tokens))
            await writer.drain()
            times: list[float] = []
            while len(times) < new_tokens:
                async with asyncio.timeout(SILENCE_S):
                    line = await reader.readline()
                if not line:
                    break
                now_s = time.monotonic() - begun_s
                if line.startswith(b"data: {"):
                    event = json.loads(line[len(b"data: ") :])
                    # The count, and not the events: a server holds back half a character.
                    count = int(event.get("timings", {}).get("predicted_n", len(times)))
                    times += [now_s] * (count - len(times))
                elif line.startswith((b"{", b"error: {")):
                    raise Error(f"the llama-server at {self._url} refused: {_said(line)}")
            if len(times) != new_tokens:
                raise Error(
                    f"the llama-server at {self._url} gave {len(times)} of {new_tokens} tokens: "
                    "its context (-c) must hold all streams with their prompts."
                )
            return tuple(times)
        finally:
            writer.close()

    def _request(self, prompt: Any, new_tokens: int) -> bytes:
        body = json.dumps(
            {
                "prompt": list(prompt),
                "n_predict": new_tokens,
                "ignore_eos": True,
                "cache_prompt": False,
                "stream": True,
                "timings_per_token": True,
                "samplers": ["top_k"],
                "top_k": 1,
            }
        ).encode()
        return self._head("POST", f"{self._base}/completion", body) + body

    def _head(self, method: str, path: str, body: bytes) -> bytes:
        key = f"Authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{key}"
            "Content-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()


def _said(line: bytes) -> str:
    try:
        answer = json.loads(line.removeprefix(b"error: "))
        return str(answer.get("error", answer).get("message", answer))
    except (ValueError, AttributeError):
        return line.decode("utf-8", "replace").strip()
