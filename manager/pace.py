"""How often the readers of texts are woken, where tokens come faster than anybody reads them.

An event costs the same whether it carries one token or eight. The first token of a text and its
end are never held back, and no token for longer than the interval.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Pace:
    """One for the readers of a process: what is held back for them is let go by one timer."""

    def __init__(self, interval_s: Callable[[], float]) -> None:
        """`interval_s`: now the least seconds between two pieces of a text; 0: nothing waits."""
        self._interval_s = interval_s
        self._held: set[asyncio.Event] = set()

    def is_due(self, last_s: float, now_s: float) -> bool:
        """Whether a text whose last piece was due at that time may have another one now."""
        return now_s - last_s >= self._interval_s()

    def hold(self, wake: asyncio.Event) -> None:
        """Set it when the interval is over, if nothing has set it before."""
        if not self._held:
            asyncio.get_running_loop().call_later(self._interval_s(), self._let_go)
        self._held.add(wake)

    def _let_go(self) -> None:
        held, self._held = self._held, set()
        for wake in held:
            wake.set()


AT_ONCE = Pace(lambda: 0.0)
