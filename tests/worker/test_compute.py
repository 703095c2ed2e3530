"""Torch's thread: order, errors, bounds, and how it ends."""

from __future__ import annotations

import asyncio
import ctypes
import threading

import psutil
import pytest

from worker import compute
from worker.compute import Compute


class Recorded:
    """Work that notes on which thread each half ran, and may wait for a sign."""

    def __init__(self, log: list[tuple[str, str]], sign: threading.Event | None = None) -> None:
        self._log, self._sign = log, sign
        self.began = threading.Event()
        self.finished = asyncio.Event()

    def compute(self) -> None:
        self.began.set()
        if self._sign is not None:
            self._sign.wait(10)
        self._log.append(("compute", threading.current_thread().name))

    def finish(self) -> None:
        self._log.append(("finish", threading.current_thread().name))
        self.finished.set()


@pytest.fixture
async def thread() -> Compute:
    return Compute(asyncio.get_running_loop())


async def test_work_computes_on_the_thread_and_finishes_on_the_loop(thread: Compute) -> None:
    log: list[tuple[str, str]] = []
    work = Recorded(log)
    assert thread.submit(work)
    await asyncio.wait_for(work.finished.wait(), 10)
    assert log == [("compute", "torch"), ("finish", threading.current_thread().name)]
    assert await thread.stop(10)


async def test_a_call_returns_or_raises_what_its_function_did(thread: Compute) -> None:
    assert await thread.call(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await thread.call(lambda: 1 // 0)
    assert await thread.stop(10)


async def test_stopping_ends_the_work_at_hand_and_drops_the_rest(thread: Compute) -> None:
    log: list[tuple[str, str]] = []
    sign = threading.Event()
    at_hand, waiting = Recorded(log, sign), Recorded(log)
    thread.submit(at_hand)
    thread.submit(waiting)
    assert await asyncio.to_thread(at_hand.began.wait, 10)
    stopping = asyncio.ensure_future(thread.stop(10))
    await asyncio.sleep(0)
    assert not thread.submit(Recorded(log))
    sign.set()
    assert await stopping
    assert at_hand.finished.is_set() and not waiting.finished.is_set()
    assert len(log) == 2


async def test_work_that_does_not_end_in_time_is_told(thread: Compute) -> None:
    sign = threading.Event()
    endless = Recorded([], sign)
    thread.submit(endless)
    assert await asyncio.to_thread(endless.began.wait, 10)
    assert not await thread.stop(0.01)
    sign.set()


async def test_a_full_queue_takes_no_more(thread: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "MAX_UNFINISHED", 2)
    sign = threading.Event()
    first, second = Recorded([], sign), Recorded([])
    assert thread.submit(first) and thread.submit(second)
    assert not thread.submit(Recorded([]))
    sign.set()
    await asyncio.wait_for(second.finished.wait(), 10)
    assert thread.submit(Recorded([]))
    assert await thread.stop(10)


async def test_memory_that_work_freed_is_given_back_to_the_system(
    thread: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs glibc")
    monkeypatch.setattr(compute, "GIVE_BACK_AFTER_S", 0.0)
    process = psutil.Process()
    kept, held = list[bytearray](), list[int]()

    def leave_holes() -> None:
        # Each of a size that is not mapped by itself; each tenth stays, so the heap cannot shrink.
        blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
        held.append(process.memory_info().rss)
        kept.extend(blocks[::10])

    await thread.call(leave_holes)
    await thread.call(lambda: None)  # begins once the thread has given back
    assert process.memory_info().rss < held[0] - 50_000_000
    assert await thread.stop(10)
