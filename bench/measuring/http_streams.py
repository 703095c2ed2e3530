"""Streams of `manager serve`, read with next to no work: what is measured is the server.

    python bench/measuring/http_streams.py PORT       a JSON line in, a JSON line out, until the end

In goes a list of streams, each a list of request bodies; every stream has a connection of its own,
open before the clock starts, and sends its next request when an answer is whole. Out come, for
every request, when it was sent, when its first token came, and its number of tokens; and the CPU
seconds that reading took. Bytes are searched for no more than where an answer begins and ends.
Needs the standard library only, so that it starts at once and holds nothing else up.
"""

from __future__ import annotations

import gc
import json
import re
import selectors
import socket
import sys
import time
from typing import Any, Final

FIRST: Final = b"data: "
END: Final = b"\r\n0\r\n\r\n"  # of a chunked answer; a JSON text has no bare line feeds
TOKENS: Final = re.compile(rb'"completion_tokens":(\d+)')
READ_BYTES: Final = 65536
TAIL_BYTES: Final = 512  # the event with the number of tokens, and what ends the stream
SILENCE_S: Final = 60.0
# Between two looks: tokens of several streams are read at once, as an adapter that moderates its
# interrupts hands them over. To be woken for every single one would cost the server's cores more
# than reading does, which is elsewhere mostly. Up to so much later a first token is seen.
PAUSE_S: Final = 0.001


class Stream:
    """One connection, and its requests one after the other."""

    def __init__(self, port: int, bodies: list[dict[str, Any]]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._requests = [_request(body) for body in reversed(bodies)]
        self._tail = b""
        self._sent_s = 0.0
        self._first_s: float | None = None
        self.done: list[tuple[float, float, int]] = []  # sent, first token, tokens

    def send(self) -> bool:
        """The next request; False when there is none."""
        if not self._requests:
            return False
        self._tail, self._first_s = b"", None
        self._sent_s = time.monotonic()
        self.socket.send(self._requests.pop())
        return True

    def read(self) -> bool:
        """What is there; False when the last answer is whole."""
        data = self.socket.recv(READ_BYTES)
        if not data:
            raise SystemExit(f"the server closed a stream; its last words: {self._tail!r}")
        if self._first_s is None and FIRST in data:
            self._first_s = time.monotonic()
        self._tail = data if len(data) >= TAIL_BYTES else (self._tail + data)[-TAIL_BYTES:]
        if not self._tail.endswith(END):
            return True
        found = TOKENS.search(self._tail)
        if self._first_s is None or found is None:
            raise SystemExit(f"an answer without tokens: {self._tail!r}")
        self.done.append((self._sent_s, self._first_s, int(found[1])))
        return self.send()


def main() -> None:
    port = int(sys.argv[1])
    gc.disable()
    for line in sys.stdin:
        print(json.dumps(run(port, json.loads(line))), flush=True)


def run(port: int, plan: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """All streams, begun at the same moment."""
    streams = [Stream(port, bodies) for bodies in plan]
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.socket, selectors.EVENT_READ, stream)
        begun_s, begun_cpu_s = time.monotonic(), time.process_time()
        running = sum(stream.send() for stream in streams)
        while running:
            ready = selector.select(SILENCE_S)
            if not ready:
                raise SystemExit(f"{running} streams have been silent for {SILENCE_S:g} s")
            for key, _ in ready:
                running -= not key.data.read()
            time.sleep(PAUSE_S)
        taken_s, cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    for stream in streams:
        stream.socket.close()
    return {
        "seconds": taken_s,
        "client_cpu_s": cpu_s,
        "streams": [
            [(sent_s - begun_s, first_s - begun_s, tokens) for sent_s, first_s, tokens in it.done]
            for it in streams
        ],
    }


def _request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}"
    return head.encode() + b"\r\ncontent-type: application/json\r\n\r\n" + data


if __name__ == "__main__":
    main()
