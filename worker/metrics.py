"""What Prometheus reads of one worker: --metrics-listen, text over HTTP.

Writes the text format itself: a small board needs no library for a page of numbers. Names and
labels are those of `manager serve`'s /metrics. Knows the socket and the format; asks for numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from proto.address import Address
from proto.errors import UsageError
from proto.messages import Status, WorkerFacts
from proto.worker_figures import COUNTERS, GAUGES, figures

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_HEAD_BYTES: Final = 8192  # of a request
MAX_CALLERS: Final = 16  # at one time
PATIENCE_S: Final = 5.0  # with a caller that does not say what it wants, or does not read

# Beside those that a manager knows as well.
OWN: Final = {
    "ready": "1 when it holds its layers, 0 while it loads.",
    "loading_ratio": "How much of what it loads is there, while it loads.",
    "weights_bytes": "Of the layers that it holds.",
    "kv_blocks": "KV blocks, leased or not.",
    "leases": "Managers' shares of its KV blocks.",
    "adapters": "Adapters in memory.",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A worker as it is now."""

    worker: str  # HOST:PORT, for people
    loading_percent: int | None  # None: it is ready
    held: tuple[WorkerFacts, Status] | None  # None while it loads for the first time


async def listen_for_metrics(
    address: Address, read: Callable[[], Reading]
) -> tuple[asyncio.Server, str]:
    """Answer GET /metrics at `address` (port 0: a free one); returns where that is as well.

    Raises:
        UsageError: the address is not this machine's, or is in use.
    """
    door = _Door(read)
    try:
        server = await asyncio.start_server(
            door.answer, address.host, address.port, limit=MAX_HEAD_BYTES
        )
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise UsageError(
            f"--metrics-listen {address}: cannot listen there ({reason}): name a free port of an "
            "address of this machine."
        ) from exc
    return server, str(Address(*server.sockets[0].getsockname()[:2]))


def exposition(reading: Reading) -> str:
    """The numbers in Prometheus' text format."""
    labels = {"worker": reading.worker}
    values: dict[str, float | None] = {"ready": float(reading.loading_percent is None)}
    if reading.loading_percent is not None:
        values["loading_ratio"] = reading.loading_percent / 100
    if reading.held is not None:
        facts, status = reading.held
        labels["layers"] = f"{facts.start_layer}:{facts.end_layer}"
        values |= _values(facts, status)
    return "".join(_lines(values, labels))


def _values(facts: WorkerFacts, status: Status) -> dict[str, float | None]:
    return figures(status) | {
        "weights_bytes": facts.stage_bytes,
        "kv_blocks": status.total_blocks,
        "leases": status.leases,
        "adapters": status.adapters,
    }


def _lines(values: dict[str, float | None], labels: dict[str, str]) -> Iterator[str]:
    where = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    for name, text in (COUNTERS | GAUGES | OWN).items():
        value = values.get(name)
        if value is None:
            continue
        kind, end = ("counter", "_total") if name in COUNTERS else ("gauge", "")
        full = f"comboio_worker_{name}{end}"
        yield f"# HELP {full} {text}\n# TYPE {full} {kind}\n{full}{{{where}}} {value!r}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _Door:
    """HTTP, as much of it as a scraper needs: one request a connection."""

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._num_callers = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request, answer it, hang up."""
        self._num_callers += 1
        try:
            if self._num_callers <= MAX_CALLERS:
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    await asyncio.wait_for(self._serve(reader, writer), PATIENCE_S)
        finally:
            self._num_callers -= 1
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            status, body, method = "431 Request Header Fields Too Large", "", "GET"
        else:
            method, _, rest = head.split(b"\r\n", 1)[0].decode("latin-1").partition(" ")
            status, body = self._reply(method, rest.partition(" ")[0].partition("?")[0])
        data = body.encode()
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Type: {CONTENT_TYPE}",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        if method != "HEAD":
            writer.write(data)
        await writer.drain()

    def _reply(self, method: str, path: str) -> tuple[str, str]:
        if path != "/metrics":
            return "404 Not Found", "there is only /metrics here\n"
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "metrics are read with GET\n"
        return "200 OK", exposition(self._read())
