"""The manager's side of one link to one worker: questions with deadlines, and what comes unasked.

Knows the order of question and answer on a link; knows no chain, no scheduler and no model.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final, TypeVar

from engine.sections import Section
from manager.event_loop import hear
from manager.worker_words import check_facts, checked
from proto.address import Address
from proto.errors import AdapterError, WorkerLost, WorkerRefused
from proto.framing import Buffer, Frame
from proto.keys import NO_KEYS, Keys
from proto.link import Link, connect
from proto.messages import (
    AdapterDone,
    AdapterFacts,
    AdapterRefused,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    DropAdapter,
    HoldSection,
    KeepAdapter,
    Lease,
    Leased,
    LinkLost,
    Message,
    Refused,
    Release,
    ReleaseAdapter,
    Role,
    Route,
    Routed,
    SectionHeld,
    SectionLoading,
    SectionRefused,
    Status,
    StatusRequest,
    StepDone,
    StepReport,
    UseAdapter,
    WorkerFacts,
)

Answer = TypeVar("Answer", bound=Message)

# Allocating the KV of a lease touches every page of it: 8 GiB at 1 GiB/s on a small board.
LEASE_TIMEOUT_S: Final = 30.0
# The worker opens a link of its own meanwhile, handshake included.
ROUTE_TIMEOUT_S: Final = 15.0
STATUS_TIMEOUT_S: Final = 5.0
# A worker reads an adapter from its disk, beside the steps that it computes.
ADAPTER_TIMEOUT_S: Final = 300.0
# A worker reckons before it loads other layers, and reads a large tensor without a word.
SECTION_STALLS_S: Final = 120.0


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What was asked and not answered yet."""

    kind: type[Message]  # of the answer
    answered: asyncio.Future[Message]
    adapter: str | None = None  # that it is about
    epoch: int = 0  # of a route

    def fits(self, answer: Message, epoch: int) -> bool:
        """Whether this is the answer to it; one to a route that was given up meanwhile is not."""
        if not isinstance(answer, self.kind):
            return False
        if isinstance(answer, Routed):
            return epoch == self.epoch
        return not isinstance(answer, AdapterDone) or answer.adapter.name == self.adapter


class Refusal(WorkerRefused):
    """What a worker said no with, on an open link."""

    def __init__(self, worker: Address, said: str) -> None:
        self.worker = str(worker)
        super().__init__(f"worker {worker} {said}")


class NextUnreachable(Refusal):
    """A worker cannot reach the one that is to come next in the chain."""

    def __init__(self, worker: Address, next_worker: str, reason: str) -> None:
        self.next = next_worker
        super().__init__(worker, f"cannot reach {next_worker}: {reason}")


class WorkerLink:
    """An open link to a worker. Set the callbacks before steps flow."""

    def __init__(self, link: Link, address: Address, facts: WorkerFacts) -> None:
        self.address, self.facts = address, facts
        # message, its payload and epoch
        self.on_step_done: Callable[[StepDone, memoryview, int], None] | None = None
        self.on_report: Callable[[StepReport], None] | None = None
        self.on_link_lost: Callable[[LinkLost, int], None] | None = None  # message, its epoch
        self.on_lost: Callable[[WorkerLost], None] | None = None
        self._link = link
        self._questions: deque[Question] = deque()
        self._leasing: asyncio.Task[int] | None = None
        self._on_percent: Callable[[int], None] | None = None  # while it loads other layers
        link.on_frame = self._on_frame
        link.on_closed = self._on_closed

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round trip; None before the first ping was answered."""
        return self._link.rtt_s

    @property
    def clock_offset_s(self) -> float:
        """The worker's monotonic clock minus ours, as good as known by now."""
        return self._link.clock_offset_s or 0.0

    @property
    def is_open(self) -> bool:
        """Whether anything can be sent."""
        return self._link.is_open

    # --- questions ---------------------------------------------------------------------------

    @property
    def blocks(self) -> int | None:
        """KV blocks that this worker has leased to us; None: none yet, or no more."""
        leasing = self._leasing
        if leasing is None or not leasing.done() or leasing.cancelled() or leasing.exception():
            return None
        return leasing.result()

    async def lease(self, lease: bytes, *, min_blocks: int, want_blocks: int, trace: bool) -> int:
        """Reserve KV blocks; returns how many were granted.

        Who is cancelled while he waits can come back: what was granted meanwhile is kept.

        Raises:
            WorkerRefused: fewer than `min_blocks` are free.
            WorkerLost: no answer came.
        """
        if self._leasing is None or (self._leasing.done() and self.blocks is None):
            question = Lease(
                lease=lease, min_blocks=min_blocks, want_blocks=want_blocks, trace=trace
            )
            self._leasing = asyncio.ensure_future(self._lease(question))
            self._leasing.add_done_callback(hear)
        return await asyncio.shield(self._leasing)

    async def _lease(self, question: Lease) -> int:
        blocks = (await self._ask(question, Leased, LEASE_TIMEOUT_S)).blocks
        if not question.min_blocks <= blocks <= question.want_blocks:
            raise Refusal(
                self.address,
                f"leased {blocks} KV blocks, where {question.min_blocks} to "
                f"{question.want_blocks} were asked for",
            )
        return blocks

    async def route(self, lease: bytes, next_worker: Address | None, *, epoch: int) -> None:
        """Tell it where this lease's steps go from there; None makes it the last.

        Raises:
            NextUnreachable: it cannot reach the next worker.
            WorkerRefused: it cannot stand there.
            WorkerLost: no answer came.
        """
        question = Route(lease=lease, next=None if next_worker is None else str(next_worker))
        await self._ask(question, Routed, ROUTE_TIMEOUT_S, epoch=epoch)

    async def status(self) -> Status:
        """Its counters now.

        Raises:
            WorkerLost: no answer came.
        """
        return await self._ask(StatusRequest(), Status, STATUS_TIMEOUT_S)

    async def adapters(self) -> list[AdapterFacts]:
        """Those that it holds for everybody, by name.

        Raises:
            WorkerLost: no answer came.
        """
        return (await self._ask(AdaptersRequest(), Adapters, STATUS_TIMEOUT_S)).adapters

    async def adapter(
        self, question: AddAdapter | KeepAdapter | DropAdapter | UseAdapter
    ) -> AdapterFacts:
        """Ask something about one adapter; how it stands then.

        Raises:
            AdapterError: no, and why, in the worker's own words.
            WorkerLost: no answer came.
        """
        name = question.name
        done = await self._ask(question, AdapterDone, ADAPTER_TIMEOUT_S, adapter=name)
        return done.adapter

    async def hold_section(
        self, fingerprint: str, section: Section, on_percent: Callable[[int], None]
    ) -> None:
        """Have it hold these layers in the place of its own; `facts` say so then.

        Its lease ends with it, whatever comes of it.

        Args:
            on_percent: told how far it is with loading.
        Raises:
            Refusal: no, and why: it holds what it held.
            WorkerLost: it went away, or has not got on with it for SECTION_STALLS_S.
        """
        question = HoldSection(
            fingerprint=fingerprint, start_layer=section.start, end_layer=section.end
        )
        self._leasing = None
        asking = asyncio.ensure_future(self._ask(question, SectionHeld, None))
        told = [time.monotonic()]

        def hear(percent: int) -> None:
            told[0] = time.monotonic()
            on_percent(percent)

        self._on_percent = hear
        try:
            while not asking.done():
                await asyncio.wait([asking], timeout=1.0)
                if time.monotonic() > told[0] + SECTION_STALLS_S:
                    self.give_up(
                        f"it has not got on with layers {section} for {SECTION_STALLS_S} s"
                    )
            self.facts = asking.result().worker
        finally:
            asking.cancel()
            self._on_percent = None

    async def ping(self) -> float:
        """Measure the round trip now, in seconds."""
        return await self._link.ping()

    # --- without an answer -------------------------------------------------------------------

    def send(self, message: Message, *payload: Buffer, epoch: int = 0) -> None:
        """Send one frame, at once.

        Raises:
            WorkerLost: the link is closed.
        """
        self._link.send(message, *payload, epoch=epoch)

    def release(self, lease: bytes) -> None:
        """Give the lease back; a worker that is gone has given it back already."""
        self._leasing = None
        if self._link.is_open:
            self._link.send(Release(lease=lease))

    def release_adapter(self, lease: bytes, number: int) -> None:
        """No run of the lease has this number any more; a worker that is gone needs no word."""
        if self._link.is_open:
            self._link.send(ReleaseAdapter(lease=lease, number=number))

    def give_up(self, reason: str) -> None:
        """Close it because the worker does not do its part: it counts as lost from here on."""
        self._link.fail(WorkerLost(str(self.address), reason))

    async def close(self, reason: str = "done") -> None:
        """Say goodbye."""
        self._link.on_closed = None
        await self._link.close(reason)

    # --- inside ------------------------------------------------------------------------------

    async def _ask(
        self,
        question: Message,
        kind: type[Answer],
        timeout_s: float | None,
        *,
        epoch: int = 0,
        adapter: str | None = None,
    ) -> Answer:
        answered: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.send(question, epoch=epoch)
        asked = Question(kind, answered, adapter, epoch)
        self._questions.append(asked)
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` can lose a cancellation
                answer = await answered
        except asyncio.CancelledError:
            # A route that is given up may never be answered, as the next one takes its place. What
            # answers any other question is still to be taken for that one.
            if kind is Routed and asked in self._questions:
                self._questions.remove(asked)
            raise
        except TimeoutError:
            name = type(question).__name__
            lost = WorkerLost(str(self.address), f"no answer to {name} within {timeout_s or 0:g} s")
            self._link.fail(lost)  # an answer that comes late would be taken for the next one
            raise lost from None
        assert isinstance(answer, kind)
        return answer

    def _on_frame(self, frame: Frame) -> None:
        match checked(frame.message, str(self.address)):
            case StepDone() as done:
                if self.on_step_done is not None:
                    self.on_step_done(done, frame.payload, frame.epoch)
            case StepReport() as report:
                if self.on_report is not None:
                    self.on_report(report)
            case LinkLost() as lost:
                self._next_is_lost(lost, frame.epoch)
            case AdapterRefused(name=name, reason=reason):
                self._refuse_adapter(name, reason)
            case Refused(reason=reason):
                self._answer_badly(Refusal(self.address, f"refused: {reason}"))
            case SectionLoading(percent=percent):
                if self._on_percent is not None:
                    self._on_percent(percent)
            case SectionRefused(reason=reason):
                asked = next((it for it in self._questions if it.kind is SectionHeld), None)
                self._settle(asked, Refusal(self.address, f"refused: {reason}"))
            case answer:
                self._answer(answer, frame.epoch)

    def _next_is_lost(self, lost: LinkLost, epoch: int) -> None:
        """The answer to the route of this epoch, or news of the chain that it made."""
        routes = [it for it in self._questions if it.kind is Routed]
        asked = next((it for it in routes if it.epoch == epoch), None)
        if asked is not None:
            self._settle(asked, NextUnreachable(self.address, lost.next, lost.reason))
        elif self.on_link_lost is not None:
            self.on_link_lost(lost, epoch)

    def _answer(self, answer: Message, epoch: int) -> None:
        self._settle(next((it for it in self._questions if it.fits(answer, epoch)), None), answer)

    def _answer_badly(self, error: WorkerRefused) -> None:
        """A refusal answers the oldest lease or route; a status is never refused."""
        asked = (it for it in self._questions if it.kind in (Leased, Routed))
        self._settle(next(asked, None), error)

    def _refuse_adapter(self, name: str, reason: str) -> None:
        asked = (it for it in self._questions if it.kind is AdapterDone and it.adapter == name)
        self._settle(next(asked, None), AdapterError(f"worker {self.address}: {reason}."))

    def _settle(self, question: Question | None, answer: Message | Exception) -> None:
        if question is None:
            return
        self._questions.remove(question)
        if question.answered.done():  # nobody waits for it any more
            return
        if isinstance(answer, Exception):
            question.answered.set_exception(answer)
        else:
            question.answered.set_result(answer)

    def _on_closed(self, error: Exception | None) -> None:
        lost = self._as_lost(error)
        questions, self._questions = self._questions, deque()
        for question in questions:
            if not question.answered.done():
                question.answered.set_exception(lost)
        if self.on_lost is not None:
            self.on_lost(lost)

    def _as_lost(self, error: Exception | None) -> WorkerLost:
        """Whatever ended the link, as the loss of this worker under the name the user gave it."""
        if isinstance(error, WorkerLost):
            return WorkerLost(str(self.address), error.reason)
        if error is not None:
            return WorkerLost(str(self.address), str(error))
        reason = self._link.goodbye
        return WorkerLost(str(self.address), f"it said goodbye: {reason}" if reason else "closed")


async def open_link(
    address: Address,
    *,
    role: Role = Role.MANAGER,
    keys: Keys = NO_KEYS,
) -> WorkerLink:
    """Call a worker and hear what it holds.

    Raises:
        WorkerUnreachable: nobody answers there.
        WorkerRefused: it does not want this manager now, in its own words.
        ProtocolError: what answers is no worker of this protocol, or knows another secret or shows
            a certificate that we do not trust.
    """
    link = await connect(
        str(address),
        role=role,
        agent=agent(),
        secret=keys.secret,
        tls=keys.tls,
        check=lambda welcome: check_facts(welcome.worker, str(address)),
    )
    assert link.welcome is not None
    return WorkerLink(link, address, link.welcome.worker)


def agent() -> str:
    """Name and version of this program, for the workers' logs."""
    try:
        return f"comboio-manager/{version('comboio')}"
    except PackageNotFoundError:
        return "comboio-manager"
