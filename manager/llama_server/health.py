"""Ask a llama-server whether it is there yet: GET /health, over a bare connection.

A few lines of HTTP rather than a client library, since it is asked many times a second from the
moment the process exists.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import Final

ANSWER_TIMEOUT_S: Final = 5.0
QUESTION: Final = "GET /health HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"


class Health(Enum):
    """What a llama-server is doing."""

    UNREACHABLE = "refuses connections"  # not there yet, or still connecting to its rpc-servers
    LOADING = "loads its model"
    READY = "is ready"


async def ask_health(host: str, port: int) -> Health:
    """One question, answered within a few seconds; never raises for what the server does."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(QUESTION.format(host=host, port=port).encode())
                await writer.drain()
                status = await reader.readline()
            finally:
                writer.close()
    except asyncio.TimeoutError:
        return Health.LOADING  # it listens, and is too busy to answer
    except (OSError, ValueError):
        return Health.UNREACHABLE
    words = status.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/"):
        return Health.UNREACHABLE
    return Health.READY if words[1] == b"200" else Health.LOADING
