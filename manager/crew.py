"""The workers that a pipeline was given: whose link is open, and who is called again.

An address whose link is gone is called until somebody answers, ever more slowly up to a second.
Knows links; knows no chain, no lease and no request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from manager.links import WorkerLink, open_link
from proto.address import Address
from proto.errors import Error, WorkerLoading, WorkerLost
from proto.keys import Keys
from proto.messages import LinkLost, Role, Status

FIRST_CALL_S: Final = 0.05
LAST_CALL_S: Final = 1.0
SLOWER: Final = 1.6


@dataclass(slots=True)
class Absentee:
    """An address where nobody is, so far as we know."""

    why: str  # a few words, of the last call
    calling: asyncio.Task[None] | None = None
    percent: int | None = None  # of its loading: somebody is there and not ready yet


class Crew:
    """All workers of one pipeline; who came back stands behind who stayed.

    Args:
        links: those that are open.
        absent: the addresses where nobody answers, and why.
        compute_deadline_s: who has been computing one thing for longer is not there for us.
        on_lost: told of each link that ends by itself.
        on_link_lost: told when a worker has lost the one behind it, with the epoch of that chain.
    """

    def __init__(
        self,
        links: Iterable[WorkerLink],
        absent: Mapping[Address, Error],
        *,
        keys: Keys,
        compute_deadline_s: float,
        on_lost: Callable[[WorkerLink, WorkerLost], None],
        on_link_lost: Callable[[WorkerLink, LinkLost, int], None],
    ) -> None:
        self._keys, self._compute_deadline_s = keys, compute_deadline_s
        self._on_lost, self._on_link_lost = on_lost, on_link_lost
        self._links: dict[Address, WorkerLink] = {}
        self.absent = {address: Absentee(str(error)) for address, error in absent.items()}
        self._changed = asyncio.Event()
        self.progressed_s = time.monotonic()  # when somebody last came, or got on with loading
        self._is_closed = False
        for link in links:
            self._adopt(link)

    @property
    def links(self) -> tuple[WorkerLink, ...]:
        """The open ones."""
        return tuple(self._links.values())

    async def changed(self, timeout_s: float) -> None:
        """Wait until somebody came or went since the last time, or so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` can lose a cancellation
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def progressed(self, _percent: int) -> None:
        """One of them gets on with what it is loading."""
        self.progressed_s = time.monotonic()

    def call_absent(self) -> None:
        """Call every address where nobody is, until somebody answers."""
        for address, absentee in self.absent.items():
            if absentee.calling is None and not self._is_closed:
                absentee.calling = asyncio.ensure_future(self._call(address, absentee))

    async def rest(self) -> None:
        """Call nobody any more."""
        calls = [it.calling for it in self.absent.values() if it.calling is not None]
        for absentee in self.absent.values():
            absentee.calling = None
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def close(self, reason: str) -> None:
        """Call nobody any more, and say goodbye to all."""
        self._is_closed = True
        await self.rest()
        await asyncio.gather(*(link.close(reason) for link in self.links))

    # --- inside ------------------------------------------------------------------------------

    def _adopt(self, link: WorkerLink) -> None:
        self._links[link.address] = link
        self.absent.pop(link.address, None)
        link.on_lost = lambda lost: self._lose(link, lost)
        link.on_link_lost = lambda lost, epoch: self._on_link_lost(link, lost, epoch)
        self._changed.set()

    def _lose(self, link: WorkerLink, lost: WorkerLost) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]
            self.absent[link.address] = Absentee(lost.reason)
            self._changed.set()
        self._on_lost(link, lost)

    async def _call(self, address: Address, absentee: Absentee) -> None:
        pause_s = FIRST_CALL_S
        while True:
            try:
                link = await self._open(address)
            except WorkerLoading as loading:
                if loading.percent != absentee.percent:
                    self.progressed_s = time.monotonic()
                absentee.why, absentee.percent = str(loading), loading.percent
            except WorkerLost as exc:
                absentee.why, absentee.percent = exc.reason, None
            except Error as exc:
                absentee.why, absentee.percent = str(exc), None
            else:
                if self._is_closed:
                    await link.close("the manager has left")
                    return
                self.progressed_s = time.monotonic()
                self._adopt(link)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * SLOWER, LAST_CALL_S)

    async def _open(self, address: Address) -> WorkerLink:
        """A link to a worker that can compute: one that hangs answers all the same.

        Raises:
            Error: nobody is there, or nobody who can.
        """
        link = await open_link(address, role=Role.MANAGER, keys=self._keys)
        try:
            status = await link.status()
            if status.working_s > self._compute_deadline_s:
                raise WorkerLost(str(address), at_one_step(status))
        except BaseException as exc:
            await link.close(f"the manager cannot use it: {exc}")
            raise
        return link


def at_one_step(status: Status) -> str:
    """Why a worker that answers counts as lost."""
    return f"it has been computing one step for {status.working_s:.0f} s"
