"""Run one command's coroutine: uvloop where there is one, signals turned into cancellation.

A first Ctrl-C or SIGTERM cancels the work, which then gives back what it holds; a second one
leaves at once. What takes long and cannot be cancelled (importing torch, from an SD card) goes to
a thread that nobody waits for then. Knows nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, TypeVar

from manager.cli import Interrupted

T = TypeVar("T")

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_background: Final[set[threading.Thread]] = set()


def hear(task: asyncio.Future[Any]) -> None:
    """For `add_done_callback`: where all who asked have given up, nobody else hears of an error."""
    if not task.cancelled():
        task.exception()


async def in_background(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function on a thread of its own and wait for it, unless this is cancelled.

    Not `asyncio.to_thread`: whoever is interrupted would wait for the thread's end all the same.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except BaseException as exc:  # whatever it is, it belongs to who awaits
            error = exc
        _background.discard(thread)
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    thread = threading.Thread(target=work, name=f"background {function.__name__}", daemon=True)
    _background.add(thread)
    thread.start()
    return await done


def leave(exit_code: int) -> NoReturn:
    """End the process, also while something still runs in the background."""
    if _background:
        # Python's own way out would stop a thread in the middle of foreign code, which ends in
        # an abort; this work has released what it held.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(exit_code)
    sys.exit(exit_code)


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
