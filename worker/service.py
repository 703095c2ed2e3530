"""What managers, neighbours and observers may ask of a worker that holds a stage.

Every method runs on the event loop and returns at once: torch works on its own thread
(`worker.compute`), and links are made in the background (`worker.chain`). Knows the messages and
what each does to leases and routes; steps are `worker.traffic`'s. Does not open the port, load the
stage or end the process, which is `worker.server`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final

from msgspec.structs import replace

from proto.errors import Error, RemoteProtocolError, WorkerRefused
from proto.framing import Frame
from proto.link import Link
from proto.messages import (
    MAX_REASON_CHARS,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    DropAdapter,
    HoldSection,
    KeepAdapter,
    Lease,
    Leased,
    LinkLost,
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
    Step,
    UseAdapter,
    WorkerFacts,
)
from worker.allocation import Allocation
from worker.answers import answer
from worker.chain import NextLink
from worker.compute import Compute
from worker.leases import Leases, OpenLease
from worker.loading import Loading, LoadingAborted
from worker.logs import fields
from worker.resection import Held, Resections, StillHeld, in_words
from worker.status import Counters, make_status
from worker.steps import StepComputer
from worker.traffic import Traffic

log = logging.getLogger("comboio.worker")

TELL_EVERY_S: Final = 0.5  # how far the loading of other layers is

ConnectNext = Callable[[str, bytes], Awaitable[Link]]  # address of the next worker, lease id


class Service:
    """A loaded stage and everybody who uses it."""

    def __init__(
        self,
        held: Held,
        compute: Compute,
        connect_next: ConnectNext,
        name: str,
        resections: Resections,
        on_nothing_held: Callable[[Error], None],
    ) -> None:
        """Begin to serve.

        Args:
            connect_next: opens a link to the next worker of a chain.
            name: HOST:PORT, for sentences and faults.
            resections: the way to hold other layers.
            on_nothing_held: told when that has failed and the old ones are gone.
        """
        self._name = name
        self._compute = compute
        self._connect_next = connect_next
        self._resections, self._on_nothing_held = resections, on_nothing_held
        self._resection: asyncio.Task[None] | None = None
        self._counters = Counters()
        self._links: set[Link] = set()
        self._hold(held)
        self._from_manager: Final = {
            Lease: self._lease,
            Route: self._route,
            Release: self._release,
            Step: self._step_of_manager,
            StatusRequest: self._status,
            AdaptersRequest: self._list_adapters,
            AddAdapter: self._add_adapter,
            KeepAdapter: self._keep_adapter,
            DropAdapter: self._drop_adapter,
            UseAdapter: self._use_adapter,
            ReleaseAdapter: self._release_adapter,
            HoldSection: self._hold_section,
        }
        self._from_observer: Final = {
            StatusRequest: self._status,
            AdaptersRequest: self._list_adapters,
        }

    @property
    def loading(self) -> Loading | None:
        """How far it is with loading other layers; None: it holds what its facts say."""
        return self._resections.loading

    @property
    def facts(self) -> WorkerFacts:
        """What this worker says of itself, with the blocks that are free now."""
        return replace(self._facts, free_blocks=self._leases.free_blocks)

    def check_neighbour(self, lease_id: bytes | None) -> None:
        """Refuse a neighbour's link that carries the steps of no lease of ours.

        Raises:
            WorkerRefused: in one sentence.
        """
        if lease_id is None or self._leases.get(lease_id) is None:
            name = "none" if lease_id is None else lease_id.hex()[:8]
            raise WorkerRefused(
                f"worker {self._name} knows no lease {name}: its manager must ask for "
                "one here before it routes steps to this worker"
            )

    def accept(self, link: Link) -> None:
        """Serve a link whose handshake is done, until it closes."""
        self._links.add(link)
        role = link.hello.role
        if role is Role.MANAGER:
            link.on_closed = partial(self._manager_closed, link)
            link.on_frame = partial(self._manager_says, link)
            log.info("manager link open", extra=fields(peer=link.peer, agent=link.hello.agent))
        elif role is Role.NEIGHBOUR:
            self._accept_neighbour(link)
        else:
            link.on_closed = partial(self._closed, link)
            link.on_frame = partial(self._observer_says, link)

    async def stop(self, deadline_s: float) -> bool:
        """Take no more steps; what torch computes now is still handed on.

        Returns:
            False if a file of an adapter is still being read at the deadline.
        """
        self._traffic.stop()
        if self._resections.loading is not None:
            self._resections.loading.is_aborted = True
        return await self._adapters.stop(deadline_s)

    def leave_chains(self, reason: str) -> None:
        """Close the links to next workers; the others are the listener's to close."""
        for lease in self._leases:
            if lease.next is not None:
                lease.next.close(f"{self._name}: {reason}")

    # --- managers ----------------------------------------------------------------------------

    def _manager_says(self, link: Link, frame: Frame) -> None:
        self._from_manager[type(frame.message)](link, frame)

    def _observer_says(self, link: Link, frame: Frame) -> None:
        self._from_observer[type(frame.message)](link, frame)

    def _lease(self, link: Link, frame: Frame) -> None:
        asked = frame.message
        assert isinstance(asked, Lease)
        if self.loading is not None:
            reason = f"worker {self._name} is loading other layers ({self.loading.percent} %)"
            answer(link, Refused(reason=reason))
            return
        try:
            lease = self._leases.grant(
                asked.lease,
                min_blocks=asked.min_blocks,
                want_blocks=asked.want_blocks,
                manager=link,
                is_traced=asked.trace,
            )
        except WorkerRefused as exc:
            log.info("lease refused", extra=fields(peer=link.peer, reason=exc))
            answer(link, Refused(reason=str(exc)))
            return
        allocation = Allocation(self._stage, lease, self._allocated)
        if not self._compute.submit(allocation):
            self._leases.close(lease)
            answer(link, Refused(reason=f"worker {self._name} has too much to do"))

    def _allocated(self, allocation: Allocation) -> None:
        lease = allocation.lease
        if lease.is_closed:
            return
        if allocation.cache is None:
            self._leases.close(lease)
            num_bytes = lease.num_blocks * self._stage.block_bytes
            reason = (
                f"worker {self._name} cannot allocate {num_bytes} bytes for "
                f"{lease.num_blocks} KV blocks: {allocation.error}"
            )
            answer(lease.manager, Refused(reason=reason[:MAX_REASON_CHARS]))
            return
        lease.computer = StepComputer(
            self._stage,
            allocation.cache,
            lease.num_blocks,
            worker=self._name,
            adapters=lease.adapters,
        )
        log.info(
            "lease opened",
            extra=fields(
                lease=lease.short_id,
                peer=lease.manager.peer,
                blocks=lease.num_blocks,
                free=self._leases.free_blocks,
            ),
        )
        answer(lease.manager, Leased(lease=lease.id, blocks=lease.num_blocks))

    def _release(self, link: Link, frame: Frame) -> None:
        assert isinstance(frame.message, Release)
        lease = self._leases.get(frame.message.lease)
        if lease is not None and lease.manager is link:  # twice does no harm
            self._close_lease(lease, "its manager released it")

    def _manager_closed(self, link: Link, error: Exception | None) -> None:
        reason = str(error) if error is not None else "its manager said goodbye"
        log.info("manager link closed", extra=fields(peer=link.peer, reason=reason))
        for lease in self._leases.of_manager(link):
            self._close_lease(lease, reason)
        self._adapters.link_closed(link)
        self._closed(link, error)

    def _close_lease(self, lease: OpenLease, reason: str) -> None:
        self._leases.close(lease)
        self._adapters.release(lease, lease.adapters)
        if lease.next is not None:
            lease.next.close("the lease was closed")
        for neighbour in lease.neighbours:
            neighbour.close_soon("the lease was closed")
        log.info(
            "lease closed",
            extra=fields(
                lease=lease.short_id,
                reason=reason,
                blocks=lease.num_blocks,
                free=self._leases.free_blocks,
                dropped=lease.num_dropped,
            ),
        )

    # --- the chain ---------------------------------------------------------------------------

    def _route(self, link: Link, frame: Frame) -> None:
        route = frame.message
        assert isinstance(route, Route)
        lease = self._lease_of(link, route.lease)
        refusal = self._objection_to(route, frame.epoch, lease)
        if refusal is not None:
            answer(link, Refused(reason=refusal))
            return
        if lease.next is not None:
            lease.next.close("a newer route replaced this link")
        lease.epoch, lease.is_last, lease.next = frame.epoch, route.next is None, None
        if route.next is None:
            answer(link, Routed(lease=lease.id), epoch=lease.epoch)
            return
        lease.next = NextLink(
            route.next,
            connect=partial(self._connect_next, route.next, lease.id),
            ours=self._facts,
            name=self._name,
            on_open=partial(answer, link, Routed(lease=lease.id), epoch=lease.epoch),
            on_lost=partial(self._next_lost, lease, route.next, lease.epoch),
        )

    def _objection_to(self, route: Route, epoch: int, lease: OpenLease) -> str | None:
        facts = self._facts
        if epoch < lease.epoch:
            return f"a route of epoch {epoch} came after one of epoch {lease.epoch}"
        if route.next is None and not self._stage.is_last:
            return (
                f"worker {self._name} holds layers {facts.start_layer}:{facts.end_layer} of "
                f"{facts.num_layers} and cannot be the last of a chain: a worker with the layers "
                f"from {facts.end_layer} on is missing"
            )
        if route.next is not None and self._stage.is_last:
            return (
                f"worker {self._name} holds the last layers {facts.start_layer}:"
                f"{facts.end_layer}: nothing can follow it, not even {route.next}"
            )
        return None

    def _next_lost(self, lease: OpenLease, address: str, epoch: int, reason: str) -> None:
        lost = LinkLost(lease=lease.id, next=address, reason=reason[:MAX_REASON_CHARS])
        answer(lease.manager, lost, epoch=epoch)

    def _accept_neighbour(self, link: Link) -> None:
        lease_id = link.hello.lease
        lease = None if lease_id is None else self._leases.get(lease_id)
        if lease is None:  # closed since the handshake
            link.close_soon("the lease was closed")
            return
        lease.neighbours.add(link)
        link.on_closed = partial(self._neighbour_closed, link, lease)
        link.on_frame = partial(self._step_of_neighbour, link, lease)
        log.info("neighbour link open", extra=fields(peer=link.peer, lease=lease.short_id))

    def _neighbour_closed(self, link: Link, lease: OpenLease, error: Exception | None) -> None:
        lease.neighbours.discard(link)
        reason = "goodbye" if error is None else str(error)
        log.info("neighbour link closed", extra=fields(peer=link.peer, reason=reason))
        self._closed(link, error)

    # --- steps -------------------------------------------------------------------------------

    def _step_of_manager(self, link: Link, frame: Frame) -> None:
        assert isinstance(frame.message, Step)
        self._traffic.take(link, self._lease_of(link, frame.message.lease), frame, frame.message)

    def _step_of_neighbour(self, link: Link, lease: OpenLease, frame: Frame) -> None:
        assert isinstance(frame.message, Step)
        if frame.message.lease != lease.id:
            raise RemoteProtocolError("a step of another lease than the link's came")
        self._traffic.take(link, lease, frame, frame.message)

    # --- adapters ----------------------------------------------------------------------------

    def _list_adapters(self, link: Link, _frame: Frame) -> None:
        answer(link, Adapters(adapters=self._adapters.listed))

    def _add_adapter(self, link: Link, frame: Frame) -> None:
        assert isinstance(frame.message, AddAdapter)
        self._adapters.add(link, frame.message)

    def _keep_adapter(self, link: Link, frame: Frame) -> None:
        assert isinstance(frame.message, KeepAdapter)
        self._adapters.keep(link, frame.message.name)

    def _drop_adapter(self, link: Link, frame: Frame) -> None:
        assert isinstance(frame.message, DropAdapter)
        self._adapters.drop(link, frame.message.name)

    def _use_adapter(self, link: Link, frame: Frame) -> None:
        asked = frame.message
        assert isinstance(asked, UseAdapter)
        self._adapters.use(link, self._lease_of(link, asked.lease), asked.number, asked.name)

    def _release_adapter(self, link: Link, frame: Frame) -> None:
        asked = frame.message
        assert isinstance(asked, ReleaseAdapter)
        lease = self._leases.get(asked.lease)
        if lease is not None and lease.manager is link:  # closed meanwhile: released as well
            self._adapters.release(lease, [asked.number])

    # --- other layers ------------------------------------------------------------------------

    def _hold(self, held: Held) -> None:
        """Serve with this stage from here on; nobody has a lease."""
        self._held = held
        self._stage, self._facts, self._adapters = held.stage, held.facts, held.adapters
        self._leases = Leases(held.facts.total_blocks, held.stage.block_tokens)
        self._traffic = Traffic(held.facts, self._name, self._compute, self._counters)

    def _hold_section(self, link: Link, frame: Frame) -> None:
        asked = frame.message
        assert isinstance(asked, HoldSection)
        refusal = self._resections.objection_to(asked, self._held)
        others = sum(lease.manager is not link for lease in self._leases)
        if refusal is None and others:
            refusal = (
                f"it serves {others} leases of other managers with layers "
                f"{self._facts.start_layer}:{self._facts.end_layer}"
            )
        if refusal is not None:
            self._refuse_section(link, refusal)
            return
        for lease in self._leases.of_manager(link):
            self._close_lease(lease, "its manager wants other layers held")
        change = self._resections.change(asked, self._held)
        self._resection = asyncio.get_running_loop().create_task(self._change_to(link, change))
        self._tell_loading(link, -1)

    async def _change_to(self, link: Link, change: Coroutine[Any, Any, Held]) -> None:
        try:
            await self._adapters.stop(0)  # what a link was loading for itself belongs to the old
            held = await change
        except StillHeld as exc:
            self._hold(exc.held)
            self._refuse_section(link, str(exc))
        except LoadingAborted:
            self._refuse_section(link, "it is being stopped")
        except Exception as exc:  # foreign code loads them
            error = exc if isinstance(exc, Error) else Error(in_words(exc))
            self._refuse_section(link, str(error))
            self._on_nothing_held(error)
        else:
            self._hold(held)
            log.info(
                "layers held",
                extra=fields(
                    layers=f"{held.facts.start_layer}:{held.facts.end_layer}",
                    bytes=held.facts.stage_bytes,
                    blocks=held.facts.total_blocks,
                ),
            )
            answer(link, SectionHeld(worker=self.facts))

    def _tell_loading(self, link: Link, told: int) -> None:
        """How far it is, as long as it loads."""
        loading = self.loading
        if self._resection is None or self._resection.done() or not link.is_open:
            return
        percent = told if loading is None else loading.percent
        if percent > told:
            answer(link, SectionLoading(percent=percent))
        asyncio.get_running_loop().call_later(TELL_EVERY_S, self._tell_loading, link, percent)

    def _refuse_section(self, link: Link, reason: str) -> None:
        log.info("other layers refused", extra=fields(peer=link.peer, reason=reason))
        answer(link, SectionRefused(reason=reason[:MAX_REASON_CHARS]))

    # --- the rest ----------------------------------------------------------------------------

    def _status(self, link: Link, _frame: Frame) -> None:
        answer(link, self.status())

    def status(self) -> Status:
        """How this worker fares now."""
        counters = self._counters
        return make_status(
            counters,
            received_bytes=counters.received_bytes + sum(it.received_bytes for it in self._links),
            sent_bytes=counters.sent_bytes + sum(it.sent_bytes for it in self._links),
            read_bytes=self._stage.read_bytes,
            total_blocks=self._leases.total_blocks,
            free_blocks=self._leases.free_blocks,
            num_leases=len(self._leases),
            device_name=self._stage.device_name,
            num_adapters=self._adapters.count,
            adapter_bytes=self._adapters.num_bytes,
            room_bytes=self._resections.room_bytes(self._stage),
            working_s=self._compute.working_s,
        )

    def _lease_of(self, link: Link, lease_id: bytes) -> OpenLease:
        """The manager's own lease; another manager's counts as unknown."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.manager is not link:
            raise RemoteProtocolError(f"lease {lease_id.hex()[:8]} is not open on this link")
        return lease

    def _closed(self, link: Link, _error: Exception | None) -> None:
        self._links.discard(link)
        self._counters.received_bytes += link.received_bytes
        self._counters.sent_bytes += link.sent_bytes
