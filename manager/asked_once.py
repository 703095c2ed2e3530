"""Questions that each worker is asked once, however often it is needed to know the answer.

A recovery that is given up halfway leaves questions on their way: the next one waits for the same
answers, as a worker that did what it was asked would refuse to do it twice. Knows links and what
was asked of whom; what the questions are is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from manager.event_loop import hear
from manager.links import WorkerLink

Answer = TypeVar("Answer")


class AskedOnce(Generic[Answer]):
    """Who was asked what, and what came of it."""

    def __init__(self) -> None:
        self._asked: dict[tuple[WorkerLink, Hashable], asyncio.Task[Answer]] = {}

    async def ask(
        self, link: WorkerLink, what: Hashable, ask: Callable[[], Coroutine[Any, Any, Answer]]
    ) -> Answer:
        """The answer to `what`, asked if nobody has; one that failed is asked again.

        Who is cancelled while he waits can come back.
        """
        asked = self._asked.get((link, what))
        if asked is None or (asked.done() and has_failed(asked)):
            asked = self._asked[link, what] = asyncio.ensure_future(ask())
            asked.add_done_callback(hear)
        return await asyncio.shield(asked)

    def forget(self, is_void: Callable[[WorkerLink, Hashable], bool]) -> None:
        """Some of it holds no more, and will be asked again."""
        self._asked = {key: it for key, it in self._asked.items() if not is_void(*key)}


def has_failed(task: asyncio.Task[Any]) -> bool:
    """Of a task that is done: whether there is no answer."""
    return task.cancelled() or task.exception() is not None
