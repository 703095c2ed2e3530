"""Bring the ranks of a run together: the first one's connection to each, and torch's store."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from manager.finetune.ranks_launch import Launch
from manager.finetune.ranks_link import Member
from manager.finetune.ranks_place import Place, bind, listen
from manager.finetune.ranks_watch import Hub, Spoke


@dataclass(frozen=True, slots=True)
class Meeting:
    """All ranks are there."""

    watch: Hub | Spoke
    store: Any  # torch.distributed's


def meet(launch: Launch, place: Place, check: Callable[[], None] = lambda: None) -> Meeting:
    """Find the others.

    Args:
        check: asked now and then by the first rank while it waits; raises if others will not come.
    Raises:
        LostError: some of them do not come.
    """
    dist: Any = import_module("torch.distributed")  # some of its names are not declared
    me = Member(
        rank=launch.rank,
        host=socket.gethostname().partition(".")[0],
        pid=os.getpid(),
        local_rank=launch.local_rank,
    )
    if launch.num_ranks == 1:
        return Meeting(Hub(me, 1, None, ""), dist.HashStore())
    if launch.rank == 0:
        hub = Hub(me, launch.num_ranks, place.listener or listen(place), place.token, check)
        store, port = _first_store(dist, place.host, launch.num_ranks)
        hub.start({"port": port})
        return Meeting(hub, store)
    spoke = Spoke(me, launch.num_ranks, [(place.host, it) for it in place.ports], place.token)
    facts = spoke.start()
    store = dist.TCPStore(spoke.peer, int(facts["port"]), launch.num_ranks, is_master=False)
    spoke.watch()
    return Meeting(spoke, store)


def _first_store(dist: Any, host: str, num_ranks: int) -> tuple[Any, int]:
    """torch's store, which the other ranks connect to; it keeps the socket."""
    listener = bind(host, 0)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        num_ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port
