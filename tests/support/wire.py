"""A manager's side of the wire for tests: links, leases, routes and steps, without a manager."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from proto.codec import pack_step_tables
from proto.link import Link, connect
from proto.messages import (
    Lease,
    Leased,
    Message,
    Role,
    Route,
    Routed,
    Run,
    Sampling,
    Scoring,
    Step,
    StepDone,
)

DEADLINE_S = 60.0
BLOCK_TOKENS = 16
Kind = TypeVar("Kind", bound=Message)


async def open_link(
    address: str, role: Role = Role.MANAGER, lease: bytes | None = None, **settings: Any
) -> Link:
    """A link to a worker, its handshake done."""
    return await connect(address, role=role, agent="test", lease=lease, **settings)


async def told(link: Link, kind: type[Kind]) -> Kind:
    """The next message, which must be of this kind."""
    message = (await link.receive(DEADLINE_S)).message
    assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
    return message


async def closed(link: Link) -> None:
    """Wait until the link is closed."""
    await asyncio.wait_for(link.wait_closed(), DEADLINE_S)


async def take_lease(
    link: Link, min_blocks: int = 1, want_blocks: int | None = None, *, trace: bool = False
) -> Leased:
    """A lease of a new id."""
    lease = Lease(
        lease=os.urandom(16),
        min_blocks=min_blocks,
        want_blocks=want_blocks or min_blocks,
        trace=trace,
    )
    link.send(lease)
    return await told(link, Leased)


@dataclass
class Part:
    """One run of a step, with what it has in the payload."""

    sequence: int
    start: int
    tokens: Sequence[int]
    hidden: torch.Tensor  # (tokens, hidden_size)
    blocks: Sequence[int] = ()  # default: as many as are needed, from 0
    sampling: Sampling | None = field(default_factory=Sampling)
    history: Sequence[int] = ()
    offsets: Sequence[tuple[int, float]] = ()
    mask: bytes = b""
    adapter: int | None = None
    scoring: Scoring | None = None


def pack(lease: bytes, step: int, parts: Sequence[Part]) -> tuple[Step, bytes, memoryview]:
    """The Step and the two buffers of its payload."""
    runs, tables = [], []
    for part in parts:
        end = part.start + len(part.tokens)
        blocks = part.blocks or range(-(-end // BLOCK_TOKENS))
        tables += list(blocks)
        runs.append(
            Run(
                sequence=part.sequence,
                start=part.start,
                num_tokens=len(part.tokens),
                num_blocks=len(blocks),
                rope_length=end,
                sampling=part.sampling,
                adapter=part.adapter,
                scoring=part.scoring,
            )
        )
    tokens = [token for part in parts for token in part.tokens]
    histories = [token for part in parts for token in part.history]
    offsets = [offset for part in parts for offset in part.offsets]
    hidden = torch.cat([part.hidden for part in parts]).to(torch.float32).contiguous()
    return (
        Step(lease=lease, step=step, runs=runs),
        pack_step_tables(tokens, tables, histories, offsets) + b"".join(p.mask for p in parts),
        hidden.detach().numpy().data.cast("B"),
    )


class Chain:
    """One lease over some workers, routed one after the other; a manager's view."""

    def __init__(self, links: list[Link], lease: bytes, epoch: int) -> None:
        self.links, self.lease, self.epoch = links, lease, epoch
        self._step = 0

    @classmethod
    async def open(
        cls, addresses: Sequence[str], *, blocks: int = 8, epoch: int = 1, trace: bool = False
    ) -> Chain:
        """Lease the same number of blocks everywhere and route."""
        links = [await open_link(address) for address in addresses]
        chain = cls(links, os.urandom(16), epoch)
        for link in links:
            lease = Lease(lease=chain.lease, min_blocks=blocks, want_blocks=blocks, trace=trace)
            link.send(lease)
            await told(link, Leased)
        await chain.route(addresses)
        return chain

    async def route(self, addresses: Sequence[str]) -> None:
        """Tell every worker who comes after it, with this chain's epoch."""
        following = [*addresses[1:], None]
        for link, address in zip(self.links, following, strict=True):
            link.send(Route(lease=self.lease, next=address), epoch=self.epoch)
            await told(link, Routed)

    def send(self, *parts: Part, epoch: int | None = None) -> int:
        """Send one step to the first worker; returns its number."""
        self._step += 1
        step, tables, hidden = pack(self.lease, self._step, parts)
        self.links[0].send(step, tables, hidden, epoch=self.epoch if epoch is None else epoch)
        return self._step

    async def step(self, *parts: Part) -> StepDone:
        """Send one step and wait for what the last worker says of it."""
        number = self.send(*parts)
        done = await told(self.links[-1], StepDone)
        assert done.step == number
        return done

    async def close(self) -> None:
        """Leave all workers."""
        for link in self.links:
            await link.close()
