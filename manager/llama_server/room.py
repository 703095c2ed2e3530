"""How many requests a llama-server is given at once, when it has too little room for all.

A server may share its context between what runs at the same time. When that is full, everything
that runs fails; with half as many at once it runs again. Knows nothing of HTTP or of texts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Held by a request while it runs."""

    limit: int | None  # what held when it was taken


class Room:
    """Places for requests: as many as come, until the server was full once.

    Args:
        num_slots: how many the server runs at the same time; others wait there.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._running = 0
        self._left = asyncio.Event()
        self.limit: int | None = None  # how many at once; None: as many as come

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Place]:
        """Wait for a place, and hold it."""
        while self.limit is not None and self._running >= self.limit:
            self._left.clear()
            await self._left.wait()
        self._running += 1
        try:
            yield Place(self.limit)
        finally:
            self._running -= 1
            self._left.set()

    def make_room(self, place: Place) -> bool:
        """The server was full while this place was held: fewer run at once from now on.

        Returns:
            whether the request should run again; not where it was alone.
        """
        if self.limit != place.limit:
            return True  # another of those that failed together has said so
        at_once = min(self._running, self._num_slots, place.limit or self._running)
        if at_once <= 1:
            return False
        self.limit = at_once // 2
        return True
