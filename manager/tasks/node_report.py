"""What each node of a pipeline job did, as its workers count it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manager.addresses import parse_addresses
from manager.tables import size, table
from manager.tasks.rendezvous import TaskNote
from manager.topology import call_all, close_all
from manager.workers import look_at
from proto.errors import Error
from proto.keys import read_keys
from proto.messages import Role

TITLES = ("NODE", "SECTION", "LAYERS", "DEVICE", "STEPS", "TOKENS", "COMPUTE", "PEAK MEMORY")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One section's counters since its worker started."""

    node: str
    rank: int
    generation: int
    layers: str
    device: str
    steps: int
    tokens: int
    compute_s: float
    peak_rss_bytes: int


async def look_at_nodes(notes: Mapping[int, TaskNote], secret_file: Path) -> list[NodeReport]:
    """Ask every worker, in the order of the sections.

    Raises:
        WorkerLost: one does not answer.
    """
    ranks = sorted(notes)
    addresses = parse_addresses([notes[rank].address for rank in ranks])
    links = await call_all(addresses, Role.OBSERVER, read_keys(secret_file))
    try:
        views = await look_at(links)
    finally:
        await close_all(links, "done")
    return [
        NodeReport(
            node=notes[rank].node,
            rank=rank,
            generation=notes[rank].generation,
            layers=f"{view.facts.start_layer}:{view.facts.end_layer}",
            device=view.facts.device,
            steps=view.status.steps,
            tokens=view.status.tokens,
            compute_s=view.status.compute_s,
            peak_rss_bytes=view.status.peak_rss_bytes,
        )
        for rank, view in zip(ranks, views, strict=True)
    ]


def steps_between(after: NodeReport, before: NodeReport) -> int:
    """Steps of the work itself; a worker that was started anew counts from nothing."""
    return after.steps - (before.steps if after.generation == before.generation else 0)


def check_all_worked(after: Sequence[NodeReport], before: Sequence[NodeReport]) -> None:
    """A node that is paid for and computes nothing is an error.

    A worker that was started anew is none: what it ran before is not counted, and others may have
    taken over its layers until it was back.

    Raises:
        Error: names the nodes that ran no step while others did.
    """
    pairs = list(zip(after, before, strict=True))
    if not any(steps_between(late, early) for late, early in pairs):
        return  # all rows were there already
    idle = [
        late
        for late, early in pairs
        if steps_between(late, early) == 0 and late.generation == early.generation
    ]
    if idle:
        names = ", ".join(f"{it.node} (section {it.rank})" for it in idle)
        raise Error(f"ran no step: {names}; the other nodes did all the work")


def describe(after: Sequence[NodeReport], before: Sequence[NodeReport]) -> str:
    """A table of what each section did for the work."""
    rows = [
        (
            late.node,
            str(late.rank),
            late.layers,
            late.device,
            str(steps_between(late, early)),
            str(late.tokens - (early.tokens if late.generation == early.generation else 0)),
            f"{late.compute_s:.1f} s",
            size(late.peak_rss_bytes),
        )
        for late, early in zip(after, before, strict=True)
    ]
    return "what each node did:\n" + table(TITLES, rows)
