"""After a loss: find a chain among the workers that are there, and move the requests onto it.

A chain may stand again because a spare holds the lost section, because the worker came back, or
because others took its layers over (`manager.resplit`); whichever is first. Every try has an epoch
of its own, so that nothing of an earlier one is taken for its. Knows links and leases; what happens
to requests meanwhile is the pipeline's business.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final, Protocol

from manager.adapter_book import AdapterBook
from manager.crew import Crew
from manager.links import NextUnreachable, Refusal, WorkerLink
from manager.resplit import Resplit
from manager.topology import OpenChain, arrange, check_reachability
from proto.errors import Error, ModelError, SplitError, UsageError, WorkerLost
from proto.messages import WorkerFacts

# A worker that refused, or could not be reached by the one before it, is tried again so soon.
AVOID_S: Final = 0.25
# How often the deadlines are looked at while nothing else happens.
TICK_S: Final = 0.1
# The lost worker, or a supervisor that starts it again, gets so long before others load its layers.
TAKEOVER_AFTER_S: Final = 5.0
# A board may need minutes for a chunk of a prompt; ten of them mean that the step never ends.
COMPUTE_DEADLINE_S: Final = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySettings:
    """How long to wait for what after a loss."""

    # Requests fail when there is no chain by then; 0: at once. A worker that loads and gets on
    # with it is waited for.
    timeout_s: float = 30.0
    # Until then nobody else loads the layers of a lost worker; None: never.
    resplit_after_s: float | None = TAKEOVER_AFTER_S
    # A worker that is at one step for longer is lost, though it answers.
    compute_deadline_s: float = COMPUTE_DEADLINE_S

    def __post_init__(self) -> None:
        if not 0 <= self.timeout_s <= 1e6:
            raise UsageError(
                f"--recovery-timeout {self.timeout_s:g}: give seconds, from 0 (requests fail as "
                "soon as a worker is lost) to a million."
            )
        if self.resplit_after_s is not None and not 0 <= self.resplit_after_s <= 1e6:
            raise UsageError(
                f"--takeover-after {self.resplit_after_s:g}: give seconds, from 0 (the others load "
                "the layers of a lost worker at once) to a million, or never."
            )
        if not 0 < self.compute_deadline_s <= 1e6:
            raise UsageError(
                f"a compute deadline of {self.compute_deadline_s:g}: give seconds, up to a million."
            )


class Host(Protocol):
    """Whose chain it is."""

    def next_epoch(self) -> int:
        """Another try begins: the number of its chain."""

    def blocks_needed(self) -> int:
        """KV blocks of the largest request that is not over."""

    def give_up(self, error: WorkerLost) -> None:
        """No chain came in time; a later one is still welcome."""

    def check(self, facts: WorkerFacts) -> None:
        """Raises ModelError where a worker does not hold the pipeline's model."""


class Recovery:
    """The way from one loss to the next chain."""

    def __init__(
        self,
        host: Host,
        crew: Crew,
        adapters: AdapterBook,
        settings: RecoverySettings,
        *,
        lease: bytes,
        want_blocks: int,
        trace: bool,
        resplit: Resplit | None,
    ) -> None:
        self._host, self._crew, self._adapters = host, crew, adapters
        self._settings, self._resplit = settings, resplit
        self._lease, self._want_blocks, self._trace = lease, want_blocks, trace
        self._began_s = time.monotonic()
        self._avoided: dict[WorkerLink, float] = {}  # until when
        self._reasons: dict[str, str] = {}  # why a way is not open, by who said so
        self._has_given_up = settings.timeout_s == 0  # then nobody waited from the beginning

    async def run(self, lost: WorkerLost) -> OpenChain:
        """A chain with leases and routes; waits for it as long as it takes.

        Args:
            lost: whom the requests fail with, should nobody come in time.
        """
        while True:
            chain = self._find()
            if chain is not None and await self._try(chain):
                return chain
            if chain is None and self._is_resplit_due():
                await self._have_layers_taken_over(lost)
            self._look_at_the_time(lost)
            await self._crew.changed(TICK_S)

    # --- a chain -----------------------------------------------------------------------------

    def _find(self) -> OpenChain | None:
        """Who could make up a chain now."""
        now_s = time.monotonic()
        self._avoided = {it: until_s for it, until_s in self._avoided.items() if until_s > now_s}
        links = [it for it in self._crew.links if it not in self._avoided and self._fits(it)]
        if not links:
            return None
        try:
            chain = arrange(links)
        except (SplitError, ModelError) as exc:
            self._reasons["chain"] = str(exc)
            return None
        return chain

    def _fits(self, link: WorkerLink) -> bool:
        try:
            self._host.check(link.facts)
        except ModelError as exc:
            self._reasons[str(link.address)] = str(exc).rstrip(".")
            return False
        return True

    async def _try(self, chain: OpenChain) -> bool:
        """Lease and route; whether the chain stands then."""
        setting_up = asyncio.ensure_future(self._set_up(chain, self._host.next_epoch()))
        try:
            while not setting_up.done() and all(link.is_open for link in chain.links):
                changed = asyncio.ensure_future(self._crew.changed(TICK_S))
                await asyncio.wait([setting_up, changed], return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                await asyncio.gather(changed, return_exceptions=True)
        finally:
            setting_up.cancel()  # somebody of it is gone, and nobody needs to wait for the rest
        try:
            await setting_up
        except asyncio.CancelledError:
            if not setting_up.cancelled():
                raise  # it is we who are cancelled
            return False
        except NextUnreachable as exc:
            self._avoid(chain, exc.next, exc)
        except (WorkerLost, Refusal) as exc:
            self._avoid(chain, exc.worker, exc)
        except Error as exc:
            self._reasons["chain"] = str(exc)
            await asyncio.sleep(AVOID_S)
        else:
            return all(link.is_open for link in chain.links)
        return False

    async def _set_up(self, chain: OpenChain, epoch: int) -> None:
        await check_reachability([link.address for link in chain.links])
        least = max(1, min(self._host.blocks_needed(), self._want_blocks))
        await chain.lease(
            self._lease, min_blocks=least, want_blocks=self._want_blocks, trace=self._trace
        )
        await chain.route(self._lease, epoch=epoch)
        await self._adapters.follow(chain.links)
        if self._trace:
            await chain.compare_clocks()

    def _avoid(self, chain: OpenChain, address: str, why: Error) -> None:
        """Do without it for a moment, if that is possible."""
        self._reasons[address] = str(why)
        for link in chain.links:
            if str(link.address) == address:
                self._avoided[link] = time.monotonic() + AVOID_S

    async def _have_layers_taken_over(self, lost: WorkerLost) -> None:
        """Let it take its time, as long as they get on with it."""
        assert self._resplit is not None
        taking_over = asyncio.ensure_future(self._resplit.run())
        try:
            while not taking_over.done():
                await asyncio.wait([taking_over], timeout=TICK_S)
                self._look_at_the_time(lost)
            taking_over.result()
        finally:
            taking_over.cancel()

    # --- time --------------------------------------------------------------------------------

    def _is_resplit_due(self) -> bool:
        """Whether the lost worker had its time, and nobody is about to take its place."""
        after_s = self._settings.resplit_after_s
        if self._resplit is None or after_s is None or self._avoided:
            return False
        if any(absentee.percent is not None for absentee in self._crew.absent.values()):
            return False
        return time.monotonic() >= max(self._began_s + after_s, self._resplit.next_s)

    def _look_at_the_time(self, lost: WorkerLost) -> None:
        since_s = max(self._began_s, self._crew.progressed_s)
        if self._has_given_up or time.monotonic() < since_s + self._settings.timeout_s:
            return
        self._has_given_up = True
        self._host.give_up(WorkerLost(lost.worker, f"{lost.reason}; {self._why_no_way()}"))

    def _why_no_way(self) -> str:
        """What is missing, in the words of whoever said so."""
        parts = [f"nobody took its place within {self._settings.timeout_s:g} s"]
        parts += [
            f"{it} does not answer ({absent.why})" for it, absent in self._crew.absent.items()
        ]
        open_ones = {str(link.address) for link in self._crew.links} | {"chain"}
        parts += [why.rstrip(".") for who, why in self._reasons.items() if who in open_ones]
        if self._resplit is not None and self._resplit.why_not:
            parts.append(self._resplit.why_not.rstrip("."))
        return "; ".join(parts)
