"""Torch's thread: one piece of work at a time, in order of arrival, away from the event loop.

Work has two halves: `compute` runs on the thread, `finish` on the loop afterwards. Nothing else
crosses between the two but the time at which it began, so neither side takes a lock. Knows nothing
of steps or models, and serves as well for other work that must not hold up the loop.

The queue is bounded: `submit` says no when it is full, and the caller tells whoever asked. The
thread is a daemon: a step that hangs in torch must not keep the process from leaving.

Computing frees memory, of which the C library keeps the most for what comes next: now and then it
is given back to the system, once an outcome is on its way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Generic, Protocol, TypeVar

from proto.errors import Error
from worker.memory import give_back

Result = TypeVar("Result")

# A well-behaved manager has at most one step per stage and one more in flight, and a model of 126
# layers has at most 126 stages; a few managers at once fit.
MAX_UNFINISHED: Final = 1024
# After so much work. A chunk of 256 tokens leaves some 40 MB behind: to return them and to be given
# them again takes 10 ms. A decode step leaves next to nothing.
GIVE_BACK_AFTER_S: Final = 0.25


class Work(Protocol):
    """Something to do on torch's thread."""

    def compute(self) -> None:
        """Do it, on the thread. Must not raise: an error is part of the outcome."""

    def finish(self) -> None:
        """Deal with the outcome, on the event loop."""


class Compute:
    """The thread and its queue. Create it, and call its methods, on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str = "torch") -> None:
        self._loop = loop
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._num_unfinished = 0
        self._began_s: float | None = None  # with what the thread is at; None: with nothing
        self._stopping = False
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def working_s(self) -> float:
        """How long the thread has been at what it does now; 0 when it rests."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def submit(self, work: Work) -> bool:
        """Queue some work; False if the queue is full or the thread is to stop."""
        if self._stopping or self._num_unfinished >= MAX_UNFINISHED:
            return False
        self._num_unfinished += 1
        self._queue.put(work)
        return True

    async def call(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the thread and return, or raise, what it did.

        Raises:
            Error: the queue is full, or the thread is to stop.
        """
        future: asyncio.Future[Result] = self._loop.create_future()
        if not self.submit(_Call(function, future)):
            raise Error("this worker has too much to do, or is leaving: ask it again later")
        return await future

    async def stop(self, deadline_s: float) -> bool:
        """Let the work at hand end and drop the rest; False if it did not end in time."""
        self._stopping = True
        self._queue.put(None)  # wakes the thread
        try:
            await asyncio.wait_for(self._ended.wait(), deadline_s)
        except asyncio.TimeoutError:
            return False
        return True

    def _run(self) -> None:
        queue, hand_back = self._queue, self._loop.call_soon_threadsafe
        worked_s = 0.0
        while (work := queue.get()) is not None and not self._stopping:
            began_s = self._began_s = time.monotonic()
            work.compute()
            worked_s += time.monotonic() - began_s
            self._began_s = None
            hand_back(self._finish, work)
            del work  # or its tensors and its lease would live until the next one comes
            if worked_s >= GIVE_BACK_AFTER_S:
                give_back()
                worked_s = 0.0
        hand_back(self._ended.set)

    def _finish(self, work: Work) -> None:
        self._num_unfinished -= 1
        work.finish()


class _Call(Generic[Result]):
    """A plain function as work, with a future for its result."""

    def __init__(self, function: Callable[[], Result], future: asyncio.Future[Result]) -> None:
        self._function = function
        self._future = future
        self._settle: Callable[[], None]

    def compute(self) -> None:
        try:
            result = self._function()
        except BaseException as exc:  # whatever it is, it belongs to who awaits
            error = exc
            self._settle = lambda: self._future.set_exception(error)
        else:
            self._settle = lambda: self._future.set_result(result)

    def finish(self) -> None:
        if not self._future.done():
            self._settle()
