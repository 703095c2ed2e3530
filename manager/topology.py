"""From addresses to an ordered chain of open links, with a lease and a route on it.

A thin shell around `engine.sections.check_chain`, which decides whether the workers fit. Knows
links and sockets; knows no request and no scheduler. Who is called again after a loss stands in
`manager.crew`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Final

from engine.sections import Candidate, check_chain
from manager.addresses import DEFAULT_FIRST, is_loopback, neighbours, parse_addresses
from manager.links import WorkerLink, open_link
from proto.address import Address
from proto.errors import Error, UsageError, WorkerLoading, WorkerLost, WorkerUnreachable
from proto.keys import NO_KEYS, Keys
from proto.messages import Role, WorkerFacts

# The fastest of so many round trips tells a clock to some tens of microseconds on one switch.
CLOCK_PINGS: Final = 8


class OpenChain:
    """Links to workers that together hold every layer once, first section first.

    Args:
        links: of the stages, in their order.
        others: to workers that are not needed now: spares, mostly.
        absent: addresses that were named and where nobody answers, and why.
    """

    def __init__(
        self,
        links: Sequence[WorkerLink],
        others: Sequence[WorkerLink] = (),
        absent: Mapping[Address, Error] = MappingProxyType({}),
    ) -> None:
        self.links, self.others, self.absent = tuple(links), tuple(others), dict(absent)

    @property
    def facts(self) -> tuple[WorkerFacts, ...]:
        """What the workers said of themselves."""
        return tuple(link.facts for link in self.links)

    async def lease(self, lease: bytes, *, min_blocks: int, want_blocks: int, trace: bool) -> int:
        """Reserve the same number of blocks on every worker; returns how many.

        Those that have leased already keep what they have; one that could never lease so many as
        are needed leases what it has.

        Raises:
            WorkerRefused, WorkerLost: the first that did not grant it.
        """
        granted = await asyncio.gather(
            *(
                link.lease(
                    lease,
                    min_blocks=min(min_blocks, max(1, link.facts.total_blocks)),
                    want_blocks=want_blocks,
                    trace=trace,
                )
                for link in self.links
            )
        )
        return min(granted)

    async def route(self, lease: bytes, *, epoch: int) -> None:
        """Tell every worker who comes next. All must have leased before.

        Raises:
            WorkerRefused, WorkerLost: the first that cannot.
        """
        following = [*(link.address for link in self.links[1:]), None]
        routing = [
            asyncio.ensure_future(link.route(lease, address, epoch=epoch))
            for link, address in zip(self.links, following, strict=True)
        ]
        try:
            await asyncio.gather(*routing)
        finally:  # once one has failed, nobody waits for the others' answers
            for route in routing:
                route.cancel()
            await asyncio.gather(*routing, return_exceptions=True)

    async def compare_clocks(self) -> None:
        """Learn the workers' clocks well, while nothing runs: a trace is no better than these.

        Raises:
            WorkerLost: the first that does not answer.
        """
        for _ in range(CLOCK_PINGS):
            await asyncio.gather(*(link.ping() for link in self.links))

    def release(self, lease: bytes) -> None:
        """Give the blocks back."""
        for link in self.links:
            link.release(lease)

    async def close(self, reason: str) -> None:
        """Say goodbye to all, spares included."""
        await close_all([*self.links, *self.others], reason)


async def open_chain(
    workers: str | Sequence[str] | None,
    *,
    role: Role = Role.MANAGER,
    keys: Keys = NO_KEYS,
) -> OpenChain:
    """Call the workers and order them by what they hold.

    Args:
        workers: HOST:PORT each, in any order; None: the neighbours of 127.0.0.1:7710.
    Raises:
        WorkerUnreachable, WorkerRefused: somebody does not answer, or not us.
        SplitError, ModelError: they make up no chain; the sentence names the workers.
        UsageError: an address is none, or one that its predecessor cannot reach.
    """
    absent: dict[Address, Error] = {}
    if workers is None:
        links = await call_neighbours(role, keys)
    else:
        addresses = parse_addresses([workers] if isinstance(workers, str) else workers)
        links, absent = await _call_enough(addresses, role, keys)
    try:
        chain = arrange(links, absent)
        await check_reachability([link.address for link in chain.links])
    except BaseException:
        await close_all(links, "the workers make up no chain")
        raise
    return chain


def arrange(
    links: Sequence[WorkerLink], absent: Mapping[Address, Error] = MappingProxyType({})
) -> OpenChain:
    """Put links in the order of a chain.

    Raises:
        SplitError, ModelError: they make up none; the sentence names the workers.
    """
    by_address = {str(link.address): link for link in links}
    chain = check_chain([Candidate(str(link.address), link.facts) for link in links])
    ordered = [by_address[stage.address] for stage in chain.stages]
    return OpenChain(ordered, [link for link in links if link not in ordered], absent)


async def _call_enough(
    addresses: Sequence[Address], role: Role, keys: Keys
) -> tuple[list[WorkerLink], dict[Address, Error]]:
    """Open all links at once; that some are not there matters only where the rest is no chain.

    Raises:
        Error: of the first address, in their order, that failed.
    """
    outcomes = await _call(addresses, role, keys)
    links = [it for it in outcomes if isinstance(it, WorkerLink)]
    failures = {
        address: outcome
        for address, outcome in zip(addresses, outcomes, strict=True)
        if isinstance(outcome, Error)
    }
    if failures and not _can_do_without(links, failures.values()):
        await close_all(links, "another worker of the chain could not be reached")
        raise next(iter(failures.values()))
    return links, failures


def _can_do_without(links: Sequence[WorkerLink], failures: Iterable[Error]) -> bool:
    """Whether the rest make up a chain, and nobody has refused us."""
    if not links or not all(isinstance(it, (WorkerLost, WorkerLoading)) for it in failures):
        return False
    try:
        arrange(links)
    except Error:
        return False
    return True


async def call_all(addresses: Iterable[Address], role: Role, keys: Keys) -> list[WorkerLink]:
    """Open all links at once; if one cannot be opened, none is.

    Raises:
        Error: of the first address, in their order, that failed.
    """
    links, failures = await call_each(addresses, role, keys)
    if failures:
        await close_all(links, "another worker of the chain could not be reached")
        raise failures[0]
    return links


async def call_each(
    addresses: Iterable[Address], role: Role, keys: Keys
) -> tuple[list[WorkerLink], list[Error]]:
    """Open all links at once; those that opened, and why the others did not."""
    outcomes = await _call(addresses, role, keys)
    links = [it for it in outcomes if isinstance(it, WorkerLink)]
    return links, [it for it in outcomes if isinstance(it, Error)]


async def call_neighbours(role: Role, keys: Keys) -> list[WorkerLink]:
    """The workers at the default ports, as far as they are there.

    Raises:
        WorkerUnreachable: there is none at the first port.
    """
    try:
        first = await open_link(DEFAULT_FIRST, role=role, keys=keys)
    except WorkerUnreachable as exc:
        raise NoNeighbours(exc.reason) from exc
    others = neighbours(DEFAULT_FIRST, first.facts.num_sections or 1)[1:]
    links, failures = await call_each(others, role, keys)
    links.insert(0, first)
    # Who is not there is missed by name when the chain is checked.
    refusals = [it for it in failures if not isinstance(it, WorkerUnreachable)]
    if refusals:
        await close_all(links, "another worker of the chain could not be reached")
        raise refusals[0]
    return links


class NoNeighbours(WorkerUnreachable):
    """Nobody is at the default address, and no other was given."""

    def __init__(self, reason: str) -> None:
        super().__init__(str(DEFAULT_FIRST), reason)
        self.args = (
            f"no worker answers at {DEFAULT_FIRST} ({reason}): start workers first "
            "(`worker --sections 2 --index 0` and `worker --sections 2 --index 1`), or say where "
            "they are with --workers HOST:PORT,HOST:PORT; `manager generate --spawn 2` starts its "
            "own",
        )


async def check_reachability(ordered: Sequence[Address]) -> None:
    """Every worker is called by the one before it, at the address that we were given.

    Raises:
        UsageError: a loopback address stands behind a worker of another machine.
    """
    for before, behind in pairwise(ordered):
        if is_loopback(behind) and not is_loopback(before) and not await _is_ours(before):
            raise UsageError(
                f"worker {before} cannot reach the next worker at {behind}, which only this "
                f"machine can: start that worker with --listen on an address of the network, "
                "and name it by that address in --workers"
            )


async def close_all(links: Iterable[WorkerLink], reason: str) -> None:
    """Say goodbye on every link."""
    await asyncio.gather(*(link.close(reason) for link in links))


async def _call(addresses: Iterable[Address], role: Role, keys: Keys) -> list[WorkerLink | Error]:
    """A link or an error for each address; anything else that goes wrong is raised."""
    calls = [asyncio.ensure_future(open_link(it, role=role, keys=keys)) for it in addresses]
    try:
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    except asyncio.CancelledError:
        opened = [it for it in await _settle(calls) if isinstance(it, WorkerLink)]
        await close_all(opened, "cancelled")
        raise
    answers = [it for it in outcomes if isinstance(it, (WorkerLink, Error))]
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Error):
            await close_all([it for it in answers if isinstance(it, WorkerLink)], "a fault")
            raise outcome
    return answers


async def _settle(
    calls: Sequence[asyncio.Future[WorkerLink]],
) -> list[WorkerLink | BaseException]:
    for call in calls:
        call.cancel()
    return await asyncio.gather(*calls, return_exceptions=True)


async def _is_ours(address: Address) -> bool:
    """Whether this machine has that address: only then can a socket be bound to it."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(address.host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_can_bind(family, sockaddr) for family, _, _, _, sockaddr in found)


def _can_bind(family: int, sockaddr: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.bind(sockaddr)
    except OSError:
        return False
    return True
