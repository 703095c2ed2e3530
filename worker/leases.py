"""Which manager has how many of this worker's KV blocks.

Knows counts and lease ids. A lease's blocks are tensors of its own, numbered from 0, so no
manager can reach another's: what is shared is only the number of blocks that are free. Knows no
socket beyond the identity of the link that a lease came on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from proto.errors import WorkerRefused

if TYPE_CHECKING:
    from proto.link import Link
    from worker.adapters import HeldAdapter
    from worker.chain import NextLink
    from worker.steps import StepComputer


# Each may have a link to the next worker, beside as many that others opened to this one
# (`proto.link.MAX_LINKS`): together they stay below the 1024 files that a process usually may open.
MAX_LEASES: Final = 256


@dataclass(slots=True, eq=False)
class OpenLease:
    """One manager's share of this worker, and where its steps go from here.

    Written by the event loop; torch's thread reads `is_closed` and `epoch`, to skip steps that
    nobody waits for any more.
    """

    id: bytes
    num_blocks: int
    manager: Link
    is_traced: bool
    computer: StepComputer | None = None  # None while its blocks are being allocated
    epoch: int = -1  # of its route; before the first Route, less than any
    next: NextLink | None = None  # None: this worker is the last, or its link is not there
    is_last: bool = False
    is_closed: bool = False
    neighbours: set[Link] = field(default_factory=set)  # of the stages before
    adapters: dict[int, HeldAdapter] = field(default_factory=dict)  # by their number in runs
    num_dropped: int = 0  # steps of an older epoch, or of a link that closed

    @property
    def short_id(self) -> str:
        """For logs."""
        return self.id.hex()[:8]


class Leases:
    """All leases of one worker, and the blocks that are left."""

    def __init__(self, total_blocks: int, block_tokens: int) -> None:
        self.total_blocks = total_blocks
        self.free_blocks = total_blocks
        self._block_tokens = block_tokens
        self._open: dict[bytes, OpenLease] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenLease]:
        return iter(tuple(self._open.values()))

    def get(self, lease_id: bytes) -> OpenLease | None:
        """The open lease of this id."""
        return self._open.get(lease_id)

    def of_manager(self, manager: Link) -> list[OpenLease]:
        """The leases that came on this link."""
        return [lease for lease in self._open.values() if lease.manager is manager]

    def grant(
        self, lease_id: bytes, *, min_blocks: int, want_blocks: int, manager: Link, is_traced: bool
    ) -> OpenLease:
        """Take as many of the wanted blocks as are free.

        Raises:
            WorkerRefused: fewer are free than the manager needs, or the request makes no sense.
        """
        if lease_id in self._open:
            raise WorkerRefused(f"lease {lease_id.hex()[:8]} is open already")
        if not 1 <= min_blocks <= want_blocks:
            raise WorkerRefused(
                f"a lease needs 1 <= min_blocks <= want_blocks, not {min_blocks} and {want_blocks}"
            )
        if len(self._open) >= MAX_LEASES:
            raise WorkerRefused(
                f"{MAX_LEASES} leases are open on this worker, no more can be: wait for one to end"
            )
        if self.free_blocks < min_blocks:
            raise WorkerRefused(self._shortage(min_blocks))
        num_blocks = min(want_blocks, self.free_blocks)
        lease = OpenLease(
            id=lease_id,
            num_blocks=num_blocks,
            manager=manager,
            is_traced=is_traced,
        )
        self.free_blocks -= num_blocks
        self._open[lease_id] = lease
        return lease

    def close(self, lease: OpenLease) -> None:
        """Give the blocks back; closing twice does nothing."""
        if lease.is_closed:
            return
        lease.is_closed = True
        lease.computer = None  # the cache's memory goes with the last step that uses it
        del self._open[lease.id]
        self.free_blocks += lease.num_blocks

    def _shortage(self, min_blocks: int) -> str:
        held = self.total_blocks - self.free_blocks
        num_tokens = min_blocks * self._block_tokens
        return (
            f"{min_blocks} KV blocks ({num_tokens} tokens) are needed, {self.free_blocks} of "
            f"{self.total_blocks} are free and {held} belong to {len(self._open)} other leases: "
            "wait for them, ask for fewer tokens, or start the worker with a larger --kv-memory"
        )
