"""Have all workers of a chain load an adapter, or none; and see whether they hold the same.

Knows links and the wire's words for adapters; no request, no command line. The folder lies on the
workers' machines: nothing of it crosses a link.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from manager.links import WorkerLink
from proto.errors import AdapterError, Error
from proto.messages import AdapterFacts, AddAdapter, DropAdapter, KeepAdapter

Links = Sequence[WorkerLink]


async def load_everywhere(links: Links, name: str, path: str) -> list[AdapterFacts]:
    """Load an adapter for these links alone: it goes when they close.

    Raises:
        AdapterError: a worker cannot, or loaded another than the rest; then none has it.
        WorkerLost: a worker does not answer.
    """
    outcomes = await gather_all(links, lambda it: it.adapter(AddAdapter(name=name, path=path)))
    try:
        held = all_of(outcomes)
        check_same(links, held)
    except AdapterError:
        await _take_back(links, outcomes, name)
        raise
    return held


async def add_everywhere(links: Links, name: str, path: str) -> list[AdapterFacts]:
    """Load an adapter for everybody. Should this program die halfway, no worker keeps it.

    Raises:
        AdapterError: a worker cannot; then none has it.
        WorkerLost: a worker does not answer.
    """
    await load_everywhere(links, name, path)
    outcomes = await gather_all(links, lambda it: it.adapter(KeepAdapter(name=name)))
    try:
        return all_of(outcomes)
    except Error:
        await _take_back(links, outcomes, name)
        raise


async def drop_everywhere(links: Links, name: str) -> list[AdapterFacts]:
    """Take an adapter away from all that hold it.

    Returns:
        what became of it at each of those.
    Raises:
        AdapterError: none holds it.
        WorkerLost: a worker does not answer.
    """
    outcomes = await gather_all(links, lambda it: it.adapter(DropAdapter(name=name)))
    dropped = [it for it in outcomes if isinstance(it, AdapterFacts)]
    failures = [it for it in outcomes if isinstance(it, BaseException)]
    lost = next((it for it in failures if not isinstance(it, AdapterError)), None)
    if lost is not None:
        raise lost
    if not dropped:
        raise failures[0]
    return dropped


def check_same(links: Links, held: Sequence[AdapterFacts]) -> None:
    """See that all workers hold the same adapter.

    Raises:
        AdapterError: two hold different ones under one name; names both.
    """
    first = held[0]
    for link, other in zip(links, held, strict=True):
        if other.fingerprint != first.fingerprint:
            raise AdapterError(
                f"the adapter {first.name} is not the same on all workers: {links[0].address} "
                f"holds {first.fingerprint[:8]} ({first.path}), {link.address} holds "
                f"{other.fingerprint[:8]} ({other.path}); put the same files on both machines, "
                "and add it again."
            )


async def gather_all(
    links: Links, ask: Callable[[WorkerLink], Awaitable[AdapterFacts]]
) -> list[AdapterFacts | BaseException]:
    """Ask all at once and wait for all; an answer or an error each."""
    return await asyncio.gather(*map(ask, links), return_exceptions=True)


def all_of(outcomes: Sequence[AdapterFacts | BaseException]) -> list[AdapterFacts]:
    """The answers; the first error is raised instead."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [it for it in outcomes if isinstance(it, AdapterFacts)]


async def _take_back(
    links: Links, outcomes: Sequence[AdapterFacts | BaseException], name: str
) -> None:
    """Drop it where it was done. Who refused has another one of this name, which stays."""
    done = [link for link, it in zip(links, outcomes, strict=True) if isinstance(it, AdapterFacts)]
    for outcome in await gather_all(done, lambda it: it.adapter(DropAdapter(name=name))):
        if isinstance(outcome, BaseException) and not isinstance(outcome, Error):
            raise outcome  # who is gone, or has dropped it already, does no harm
