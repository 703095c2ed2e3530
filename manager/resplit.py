"""Have the workers that are left hold the layers of those that were lost.

Asks each what it has room for, reckons a cut (`engine.takeover`), and has those load whose section
changes; whether there is a chain then is seen by whoever called. Knows links; knows no request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from engine.sections import Section
from engine.takeover import Holder, take_over
from manager.adapter_book import AdapterBook
from manager.crew import Crew
from manager.event_loop import in_background
from manager.links import Refusal, WorkerLink
from proto.errors import Error
from proto.messages import WorkerFacts

if TYPE_CHECKING:
    from engine.plan import LayerSizes

# After a refusal, or where there is no room, it is tried again so soon: leases end.
AGAIN_S: Final = 2.0


class Resplit:
    """New sections for the workers of one pipeline.

    Args:
        model: where this machine has the checkpoint; None: the demo model.
        fingerprint: of the model.
        on_notice: told who loads what.
    """

    def __init__(
        self,
        crew: Crew,
        adapters: AdapterBook,
        *,
        model: str | None,
        fingerprint: str,
        on_notice: Callable[[str], None],
    ) -> None:
        self._crew, self._adapters = crew, adapters
        self._model, self._fingerprint = model, fingerprint
        self._on_notice = on_notice
        self._sizes: LayerSizes | None = None
        self._fixed: dict[WorkerLink, str] = {}  # they refused to change, and why
        self.next_s = 0.0  # not before then
        self.why_not = ""  # what came of the last try, when nothing did

    async def run(self) -> None:
        """Try it once; the links' facts are other ones afterwards, or `why_not` says why not."""
        self.why_not = ""
        try:
            await self._run()
        except Error as exc:
            self.why_not = str(exc)
        self.next_s = time.monotonic() + AGAIN_S

    async def _run(self) -> None:
        links = [it for it in self._crew.links if it.facts.fingerprint == self._fingerprint]
        if not links:
            return
        if self._sizes is None:
            self._sizes = await in_background(_measure, self._model, links[0].facts.dtype)
        sizes = self._sizes
        rooms = [
            status.room_bytes for status in await asyncio.gather(*(it.status() for it in links))
        ]
        holders = [
            Holder(
                section=_section(link.facts),
                room_bytes=room_bytes,
                share=_share(link.facts, sizes),
                is_fixed=link in self._fixed,
            )
            for link, room_bytes in zip(links, rooms, strict=True)
        ]
        sections = take_over(holders, sizes.layer_bytes, sizes.head_bytes)
        if sections is None:
            self.why_not = self._no_room(links, rooms, sizes)
            self._fixed.clear()
            return
        await self._change(
            [
                (link, section)
                for link, section in zip(links, sections, strict=True)
                if section not in (None, _section(link.facts))
            ]
        )

    async def _change(self, changes: list[tuple[WorkerLink, Section | None]]) -> None:
        """All at once; one that refuses keeps what it has, and the next try reckons with that."""
        names = [f"worker {link.address} loads layers {section}" for link, section in changes]
        self._on_notice(f"nobody came back: {', '.join(names)}")
        tasks = [asyncio.ensure_future(self._hold(link, it)) for link, it in changes if it]
        try:
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            for task in tasks:
                task.cancel()
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _hold(self, link: WorkerLink, section: Section) -> None:
        self._adapters.forget(link)
        try:
            await link.hold_section(self._fingerprint, section, self._crew.progressed)
        except Refusal as exc:
            self._fixed[link] = str(exc)
            raise

    def _no_room(self, links: list[WorkerLink], rooms: list[int], sizes: LayerSizes) -> str:
        total = (sum(sizes.layer_bytes) + sizes.head_bytes) // 10**6
        room = ", ".join(
            self._fixed.get(link, f"worker {link.address} has room for {room_bytes // 10**6} MB")
            for link, room_bytes in zip(links, rooms, strict=True)
        )
        return f"the others cannot hold its layers too ({total} MB in all: {room})"


def _section(facts: WorkerFacts) -> Section:
    return Section(facts.start_layer, facts.end_layer)


def _share(facts: WorkerFacts, sizes: LayerSizes) -> float:
    """Bytes that this worker holds for one byte of the model."""
    from engine.layer_bytes import section_bytes

    return facts.stage_bytes / max(1, section_bytes(sizes, _section(facts)))


def _measure(model: str | None, dtype: str) -> LayerSizes:
    from engine.layer_bytes import measure_layers

    return measure_layers(model, dtype)
