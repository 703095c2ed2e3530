"""Run one command's coroutine: uvloop where there is one, signals turned into cancellation.

A first Ctrl-C or SIGTERM cancels the work, which then gives back what it holds; a second one
leaves at once. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from manager.cli import Interrupted

T = TypeVar("T")

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end.

    Raises:
        Interrupted: a signal came; the work has tidied up.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_interruptible(work))
    return uvloop.run(_interruptible(work))


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    received: list[int] = []

    def on_signal(number: int) -> None:
        if received:
            os._exit(128 + number)  # asked twice: sockets close, and workers free the rest
        received.append(number)
        task.cancel()

    for number in SIGNALS:
        try:
            loop.add_signal_handler(number, on_signal, number)
        except (NotImplementedError, RuntimeError, ValueError):  # not on this platform or thread
            break
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted(128 + received[0]) from None
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
