"""How long requests to one server wait for any sign of it.

Knows neither HTTP nor texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Patience:
    """A deadline for all that wait, put off by news for any of them: they share the server."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadlines = set[asyncio.Timeout]()
        self._heard_s = 0.0

    @asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Raises TimeoutError when nothing was heard for so long."""
        async with asyncio.timeout(self._seconds) as deadline:
            self._deadlines.add(deadline)
            try:
                yield
            finally:
                self._deadlines.discard(deadline)

    def heard(self) -> None:
        """News came."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._heard_s < min(1.0, self._seconds / 10):
            return  # tokens come by the thousand
        self._heard_s = now_s
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(now_s + self._seconds)
