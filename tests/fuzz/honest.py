"""A manager that does what managers do, beside those that do not: its tokens must stay the same."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import torch

from proto.framing import Frame
from proto.link import Link, LinkSettings
from proto.messages import (
    AdapterDone,
    Lease,
    Leased,
    LinkLost,
    Role,
    Route,
    Routed,
    Sampling,
    StepDone,
    UseAdapter,
)
from tests.support.wire import DEADLINE_S, Part, open_link, pack, told

BLOCKS = 8
EPOCH = 5
NUM_TOKENS = 6
PROMPTS = {1: [3, 17, 42, 99, 5], 2: [8, 8, 127], 3: list(range(40, 63))}
TABLES = {1: [7, 2], 2: [0], 3: [5, 1]}
SAMPLINGS = {
    1: Sampling(),
    2: Sampling(temperature=1.3, top_k=40, seed=11),
    3: Sampling(temperature=0.9, top_p=0.95, seed=3, repetition_penalty=1.1),
}
# The machine may have much else to do.
PATIENT = LinkSettings(missed_heartbeats=200)
ADAPTED = 3  # this sequence has an adapter


class Honest:
    """One lease over a chain of workers, kept as long as it is used."""

    def __init__(self, links: list[Link], model: Any, *, has_adapter: bool) -> None:
        self.lease = os.urandom(16)
        self.links = links
        self.num_reroutes = 0
        self._lost = asyncio.Event()  # the first worker's link to the next
        self._why_lost = ""
        self._model, self._has_adapter = model, has_adapter
        self._number, self._epoch = 0, EPOCH
        self._addresses: Sequence[str] = ()

    @classmethod
    async def open(
        cls, addresses: Sequence[str], model: Any, secret: bytes, adapter: str | None
    ) -> Honest:
        links = [
            await open_link(address, Role.MANAGER, secret=secret, settings=PATIENT)
            for address in addresses
        ]
        honest = cls(links, model, has_adapter=adapter is not None)
        for link in links:
            link.send(Lease(lease=honest.lease, min_blocks=BLOCKS, want_blocks=BLOCKS))
            await told(link, Leased)
            if adapter is not None:
                link.send(UseAdapter(lease=honest.lease, number=0, name=adapter))
                await told(link, AdapterDone)
        await honest._route(addresses)
        return honest

    async def _route(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self.links[0].on_frame = None
        for link, following in zip(self.links, [*addresses[1:], None], strict=True):
            link.send(Route(lease=self.lease, next=following), epoch=self._epoch)
            while not isinstance((await link.receive(DEADLINE_S)).message, Routed):
                pass  # tokens of the chain before
        self.links[0].on_frame = self._first_says

    def _first_says(self, frame: Frame) -> None:
        assert isinstance(frame.message, LinkLost), frame.message
        self._why_lost = frame.message.reason
        self._lost.set()

    async def generate(self) -> dict[int, list[int]]:
        """All prompts anew, in one batch, over the same blocks.

        On a machine that does much else a worker may take the next one for dead. Then the chain is
        made anew, as any manager does; no other reason is accepted.
        """
        while True:
            generating = asyncio.ensure_future(self._generate())
            lost = asyncio.ensure_future(self._lost.wait())
            await asyncio.wait([generating, lost], return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
            if not self._lost.is_set():
                return await generating
            generating.cancel()
            await asyncio.gather(generating, return_exceptions=True)
            assert "no answer for" in self._why_lost, self._why_lost
            self._lost.clear()
            self._epoch += 1
            self.num_reroutes += 1
            await self._route(self._addresses)

    async def _generate(self) -> dict[int, list[int]]:
        texts = {sequence: list(prompt) for sequence, prompt in PROMPTS.items()}
        start = dict.fromkeys(PROMPTS, 0)
        for draw in range(NUM_TOKENS):
            parts = [self._part(it, texts[it], start[it], draw) for it in texts]
            self._number += 1
            step, tables, hidden = pack(self.lease, self._number, parts)
            self.links[0].send(step, tables, hidden, epoch=self._epoch)
            done = await told(self.links[-1], StepDone)
            assert (done.lease, done.step) == (self.lease, self._number)
            assert not done.faults, done.faults
            for drawn in done.drawn:
                start[drawn.sequence] = len(texts[drawn.sequence])
                texts[drawn.sequence].append(drawn.token)
        return {it: text[len(PROMPTS[it]) :] for it, text in texts.items()}

    async def close(self) -> None:
        for link in self.links:
            await link.close()

    def _part(self, sequence: int, text: list[int], start: int, draw: int) -> Part:
        tokens = text[start:]
        with torch.inference_mode():
            hidden = self._model.get_input_embeddings()(torch.tensor(tokens))
        penalised = SAMPLINGS[sequence].repetition_penalty != 1
        history = sorted(set(text)) if penalised else []
        own = SAMPLINGS[sequence].__struct_fields__
        values = {name: getattr(SAMPLINGS[sequence], name) for name in own}
        sampling = Sampling(**{**values, "draw": draw, "num_history": len(history)})
        return Part(
            sequence=sequence,
            start=start,
            tokens=tokens,
            hidden=hidden,
            blocks=TABLES[sequence],
            sampling=sampling,
            history=history,
            adapter=0 if self._has_adapter and sequence == ADAPTED else None,
        )
