"""Steps that wait for torch: how much may, and what becomes of one too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.stage_loading import load_stage
from proto.framing import Frame
from proto.messages import Message, StepDone
from tests.support.wire import Part, pack
from worker import traffic
from worker.chain import State
from worker.compute import Work
from worker.leases import OpenLease
from worker.status import Counters
from worker.steps import StepComputer
from worker.traffic import Traffic


class Manager:
    """A link that keeps what is said on it."""

    is_open = True

    def __init__(self) -> None:
        self.said: list[Message] = []

    def send(self, message: Message, epoch: int) -> None:
        self.said.append(message)


class Facts:
    max_step_tokens = 100


class Queue:
    """Torch's thread that computes when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[Work] = []

    def submit(self, work: Work) -> bool:
        self.waiting.append(work)
        return True

    def work_off(self) -> None:
        while self.waiting:
            work = self.waiting.pop(0)
            work.compute()
            work.finish()


class Following:
    """A next worker that reads as much as it is told to."""

    def __init__(self) -> None:
        self.state = State.OPEN
        self.unsent_bytes, self.steps, self.why_lost = 0, 0, ""

    def send(self, step: Message, *payload: memoryview, epoch: int) -> None:
        self.steps += 1
        self.unsent_bytes += sum(it.nbytes for it in payload)

    def give_up(self, reason: str) -> None:
        self.why_lost, self.unsent_bytes, self.state = reason, 0, State.LOST


@pytest.fixture
def lease(checkpoint: Path) -> OpenLease:
    stage = load_stage(str(checkpoint), layers=(3, 4), device="cpu")
    computer = StepComputer(stage, stage.new_cache(4), 4, "board:7710")
    manager: Any = Manager()
    made = OpenLease(id=bytes(16), num_blocks=4, manager=manager, is_traced=False, epoch=1)
    made.computer, made.is_last = computer, True
    return made


def test_steps_that_wait_are_bounded_by_their_bytes_and_one_too_many_is_a_fault(
    lease: OpenLease, part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager: Any = lease.manager
    queue: Any = Queue()
    facts: Any = Facts()
    steps = Traffic(facts, "board:7710", queue, Counters())

    def take(number: int, num_tokens: int) -> None:
        step, tables, hidden = pack(lease.id, number, [part(number, [1] * num_tokens)])
        frame = Frame(step, 1, memoryview(bytearray(tables + bytes(hidden))))
        steps.take(manager, lease, frame, step)

    monkeypatch.setattr(traffic, "MAX_WAITING_BYTES", 3000)  # 20 tokens of 32 values, or so
    take(1, 30)  # one step may always wait, however large it is
    assert len(queue.waiting) == 1
    take(2, 5)
    [refused] = manager.said
    assert isinstance(refused, StepDone) and refused.step == 2
    assert refused.faults[0].reason == "too many steps wait on this worker"
    queue.work_off()
    take(3, 5)
    take(4, 5)
    queue.work_off()
    drawn = [said.step for said in manager.said[1:] if said.drawn]
    assert drawn == [1, 3, 4]


def test_the_next_worker_that_reads_least_is_given_up_when_all_have_read_too_little(
    lease: OpenLease, part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: Any = Queue()
    facts: Any = Facts()
    steps = Traffic(facts, "board:7710", queue, Counters())
    lazy, busy = Following(), Following()

    def pass_on(following: Any, num_tokens: int) -> None:
        step, tables, hidden = pack(lease.id, 1, [part(1, [1] * num_tokens)])
        frame = Frame(step, 1, memoryview(bytearray(tables + bytes(hidden))))
        lease.next, lease.is_last = following, False
        steps.take(lease.manager, lease, frame, step)
        queue.work_off()

    monkeypatch.setattr(traffic, "MAX_UNREAD_BYTES", 10_000)  # 75 tokens of 32 values, or so
    pass_on(lazy, 40)
    pass_on(busy, 20)
    assert not lazy.why_lost and not busy.why_lost
    pass_on(busy, 20)
    assert lazy.why_lost.startswith("it does not read: ")
    assert not busy.why_lost
    assert (lazy.steps, busy.steps) == (1, 2)
