"""Make the KV blocks of a lease, on torch's thread: a large tensor takes its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from worker.leases import OpenLease

if TYPE_CHECKING:
    from engine.kv import BlockCache
    from engine.stage import Stage


class Allocation:
    """`worker.compute.Work`; afterwards it has either a cache or an error."""

    def __init__(self, stage: Stage, lease: OpenLease, then: Callable[[Allocation], None]) -> None:
        self.lease = lease
        self.cache: BlockCache | None = None
        self.error: str = ""
        self._stage, self._then = stage, then

    def compute(self) -> None:
        if self.lease.is_closed:
            return
        try:
            self.cache = self._stage.new_cache(self.lease.num_blocks)
        except Exception as exc:  # torch says "no memory" in several classes
            self.error = " ".join(str(exc).split()) or type(exc).__name__

    def finish(self) -> None:
        self._then(self)
