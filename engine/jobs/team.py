"""The processes that were started together, as a job sees them; or one alone.

Whoever started them (`manager.finetune`) knows launchers, addresses and sockets; the job gets the
numbers, and torch's store to tell the others a few words. Waiting for the first process has no
deadline: if it ends, whoever started this one ends it as well.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.jobs.stopping import StopRequest

POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """One process among those of a run."""

    rank: int
    num_ranks: int
    local_rank: int  # on its host
    hosts: tuple[str, ...]  # of each rank
    launcher: str
    store: Any  # torch.distributed's
    on_folder: Callable[[Path], None] = lambda _: None  # the run's folder is there

    @property
    def is_first(self) -> bool:
        """The first one decides and writes files."""
        return self.rank == 0

    @property
    def sentence(self) -> str:
        """`4 ranks by srun: node1 (2), node2 (2)`."""
        ranks = "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        hosts = ", ".join(f"{host} ({count})" for host, count in Counter(self.hosts).items())
        return f"{ranks} by {self.launcher}: {hosts}"

    def tell(self, topic: str, value: Any) -> None:
        """For the others, once a topic; plain values."""
        self.store.set(f"comboio/{topic}", json.dumps(value))

    def ask(self, topic: str, stop: StopRequest, what: str) -> Any:
        """Wait for what another one tells.

        Args:
            what: is not reached if a signal comes meanwhile.
        Raises:
            Stopped: a signal came.
        """
        key = f"comboio/{topic}"
        while not self.store.check([key]):
            stop.leave_if_made(what)
            time.sleep(POLL_S)  # the store's own wait hears no signal, and complains of its end
        return json.loads(self.store.get(key))


def alone() -> Team:
    """A process that has no others."""
    return Team(
        rank=0,
        num_ranks=1,
        local_rank=0,
        hosts=("this host",),
        launcher="nothing",
        store=_OwnStore(),
    )


class _OwnStore:
    """What torch's store is to several, for one."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        """Keep it."""
        self._said[key] = value

    def get(self, key: str) -> str:
        """What was kept."""
        return self._said[key]

    def check(self, keys: list[str]) -> bool:
        """Whether all of them were."""
        return all(key in self._said for key in keys)
