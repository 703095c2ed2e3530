"""Who may run now, who waits, and who is asked to come back later.

Counts sequences: a request for four texts is four of them. Knows no pipeline and no HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

# One sixteenth of every new sample: the last few dozen requests count.
LATENCY_WEIGHT: Final = 1 / 16
MAX_RETRY_AFTER_S: Final = 60


class QueueFull(Exception):
    """There is no place, not even to wait."""

    def __init__(self, wanted: int, places: int, retry_after_s: int) -> None:
        self.wanted, self.places, self.retry_after_s = wanted, places, retry_after_s
        super().__init__(f"{wanted} texts were asked for")


class Admission:
    """`max_running` sequences run, `max_waiting` wait behind them in the order they came."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.places: Final = max_running + max_waiting
        self._max_running = max_running
        self._taken = 0
        self._running = 0
        self._gate = asyncio.Semaphore(max_running)
        self._latency_s = 1.0

    @property
    def running(self) -> int:
        """Sequences that run."""
        return self._running

    @property
    def waiting(self) -> int:
        """Sequences that wait for one of those to end."""
        return self._taken - self._running

    def reserve(self, num_sequences: int) -> None:
        """Take so many places; `give_back` frees them.

        Raises:
            QueueFull: there are not so many.
        """
        if self._taken + num_sequences > self.places:
            rounds = (self.waiting + num_sequences) / self._max_running
            wait_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(rounds * self._latency_s)))
            raise QueueFull(num_sequences, self.places - self._taken, wait_s)
        self._taken += num_sequences

    def give_back(self, num_sequences: int) -> None:
        """So many of the reserved places are free again."""
        self._taken -= num_sequences

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """One reserved sequence runs in this block, as soon as its turn comes."""
        async with self._gate:
            self._running += 1
            started_s = asyncio.get_running_loop().time()
            try:
                yield
            finally:
                self._running -= 1
                took_s = asyncio.get_running_loop().time() - started_s
                self._latency_s += LATENCY_WEIGHT * (took_s - self._latency_s)
