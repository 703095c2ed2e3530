"""Keep a pipeline's chain: notice that it broke, let requests wait, and put them on the next one.

Decides what a loss means for the requests; how a new chain comes about stands in
`manager.recovery`. Knows the dispatcher and the links; knows no prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from manager.adapter_book import AdapterBook
from manager.crew import Crew, at_one_step
from manager.dispatcher import Dispatcher, Trace
from manager.links import WorkerLink
from manager.opening import Loaded
from manager.recovery import Recovery, RecoverySettings
from manager.resplit import Resplit
from manager.topology import OpenChain
from proto.errors import WorkerLost
from proto.keys import Keys
from proto.messages import LinkLost, Status, Step, StepReport, WorkerFacts

WATCH_EVERY_S: Final = 5.0  # whether a step is late, of deadlines that are longer

OnChain = Callable[[WorkerLost | None], None]  # why there is none now; None: there is one again


class ChainKeeper:
    """The chain of one pipeline, as it is now.

    Args:
        chain: leased and routed.
        num_blocks: KV blocks that all of it have leased; the same is asked of newcomers.
        on_notice: told of losses and recoveries, in words for people.
        on_chain: told of each loss as it is noticed, and when there is a chain again.
    """

    def __init__(
        self,
        chain: OpenChain,
        loaded: Loaded,
        dispatcher: Dispatcher,
        adapters: AdapterBook,
        *,
        lease: bytes,
        num_blocks: int,
        keys: Keys,
        settings: RecoverySettings,
        trace: Trace | None,
        on_notice: Callable[[str], None],
        on_chain: OnChain,
    ) -> None:
        self.chain = chain
        self.settled = asyncio.Event()  # there is a chain, or nobody waits for one
        self.settled.set()
        self.loss: WorkerLost | None = None  # what is being mended
        self._loaded, self._dispatcher, self._adapters = loaded, dispatcher, adapters
        self._lease, self._num_blocks = lease, num_blocks
        self._settings, self._trace = settings, trace
        self._on_notice, self._on_chain = on_notice, on_chain
        self._is_stopped = False
        self._mending: asyncio.Task[None] | None = None  # while there is no chain
        self._crew = Crew(
            [*chain.links, *chain.others],
            chain.absent,
            keys=keys,
            compute_deadline_s=settings.compute_deadline_s,
            on_lost=self._worker_lost,
            on_link_lost=self._next_lost,
        )
        self._resplit = Resplit(
            self._crew,
            adapters,
            model=loaded.path,
            fingerprint=loaded.entry.fingerprint,
            on_notice=on_notice,
        )
        for link in chain.links:
            self._listen(link)
        self._crew.call_absent()
        self._watching = asyncio.ensure_future(self._watch_steps())

    def send(self, step: Step, tables: bytes, hidden: memoryview, epoch: int) -> None:
        """Send a step down the chain, unless that is another one by now."""
        if epoch != self._dispatcher.epoch:
            return  # it waited for its embeddings while its chain went
        try:
            self.chain.links[0].send(step, tables, hidden, epoch=epoch)
        except WorkerLost:
            pass  # the link says so itself, and then the requests wait

    async def stop(self) -> None:
        """Whatever happens to the chain, do nothing about it any more."""
        self._is_stopped = True
        self.settled.set()
        tasks = [self._watching, *([] if self._mending is None else [self._mending])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Give the leases back, and say goodbye to all workers."""
        for link in self._crew.links:
            link.release(self._lease)
        await self._crew.close("done")

    # --- for `Recovery` ----------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Another try begins."""
        return self._dispatcher.suspend()

    def blocks_needed(self) -> int:
        """KV blocks of the largest request that is not over."""
        return -(-self._dispatcher.longest_tokens // self.chain.facts[0].block_tokens)

    def give_up(self, error: WorkerLost) -> None:
        """No chain came in time: requests end. The next one that comes is taken all the same."""
        self._dispatcher.lose(error)
        self.settled.set()

    def check(self, facts: WorkerFacts) -> None:
        """Raises ModelError where a worker does not hold this model."""
        self._loaded.check(facts)

    # --- losses ------------------------------------------------------------------------------

    def _worker_lost(self, link: WorkerLink, lost: WorkerLost) -> None:
        self._crew.call_absent()
        if link in self.chain.links and self._mending is None:
            self._chain_broke(lost, link.facts)

    def _next_lost(self, _link: WorkerLink, lost: LinkLost, epoch: int) -> None:
        if self._mending is not None or epoch != self._dispatcher.epoch:
            return  # of a chain that is no more
        reason = lost.reason.removeprefix(f"worker {lost.next} was lost: ")
        held = {str(it.address): it.facts for it in self.chain.links}
        error = WorkerLost(lost.next, f"its neighbour says: {reason}")
        self._chain_broke(error, held.get(lost.next))

    def _chain_broke(self, lost: WorkerLost, held: WorkerFacts | None) -> None:
        if self._is_stopped:
            return
        if held is not None:
            reason = f"{lost.reason}; it held layers {held.start_layer}:{held.end_layer}"
            if held.section is not None:
                reason += f" (section {held.section}/{held.num_sections})"
            lost = WorkerLost(lost.worker, reason)
        if self._settings.timeout_s == 0:
            self._dispatcher.lose(lost)
        else:
            self._dispatcher.suspend()
            self.settled.clear()
            self.loss = lost
            self._on_notice(f"{lost}; {self._dispatcher.num_active} requests wait")
        self._on_chain(lost)
        self._mending = asyncio.ensure_future(self._mend(lost))

    async def _mend(self, lost: WorkerLost) -> None:
        began_s = time.monotonic()
        recovery = Recovery(
            self,
            self._crew,
            self._adapters,
            self._settings,
            lease=self._lease,
            want_blocks=self._num_blocks,
            trace=self._trace is not None,
            resplit=self._resplit,
        )
        try:
            chain = await recovery.run(lost)
        except Exception as exc:  # a fault of ours: whoever waits must hear of it
            self.give_up(WorkerLost(lost.worker, f"{lost.reason}; recovery failed: {exc}"))
            raise
        # Nothing is awaited from here on: who is lost later is lost by the new chain.
        self._mending = self.loss = None
        self._take(chain)
        held = ", ".join(
            f"{it.facts.start_layer}:{it.facts.end_layer} at {it.address}" for it in chain.links
        )
        self._on_notice(f"going on after {time.monotonic() - began_s:.2f} s: layers {held}")
        num_blocks = min(link.blocks or 0 for link in chain.links)
        self._dispatcher.resume(num_blocks=num_blocks, num_stages=len(chain.links))
        self.settled.set()
        self._on_chain(None)

    def _take(self, chain: OpenChain) -> None:
        self.chain = chain
        for link in chain.links:
            self._listen(link)
        for link in self._crew.links:
            if link not in chain.links:
                link.release(self._lease)
                self._adapters.lease_ended(link)

    async def _watch_steps(self) -> None:
        """Give a worker up whose torch has been at one step for too long: it hangs."""
        deadline_s = self._settings.compute_deadline_s
        while True:
            await asyncio.sleep(min(WATCH_EVERY_S, deadline_s / 4))
            oldest_s = self._dispatcher.oldest_step_s
            if oldest_s is None or time.monotonic() < oldest_s + deadline_s:
                continue
            links = self.chain.links
            found = await asyncio.gather(*(it.status() for it in links), return_exceptions=True)
            for link, status in zip(links, found, strict=True):
                if isinstance(status, Status) and status.working_s > deadline_s:
                    link.give_up(at_one_step(status))

    # --- what the links say ------------------------------------------------------------------

    def _listen(self, link: WorkerLink) -> None:
        link.on_step_done = self._dispatcher.step_done
        if self._trace is not None:
            link.on_report = partial(_report, link, self._trace)


def _report(link: WorkerLink, trace: Trace, report: StepReport) -> None:
    trace.report(str(link.address), report, link.clock_offset_s)
