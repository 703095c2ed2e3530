"""`manager workers`: who holds what, how fast, how far away.

Only looks: opens links as an observer, asks, and leaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import msgspec

from engine.sections import Candidate, check_chain
from manager import event_loop
from manager.addresses import parse_addresses
from manager.cli import say
from manager.links import WorkerLink
from manager.options import WORKERS, key_options
from manager.tables import milliseconds, size, table
from manager.topology import call_each, call_neighbours, close_all
from proto.errors import Error, WorkerLoading
from proto.keys import Keys
from proto.messages import AdapterFacts, Role, Status, WorkerFacts

TITLES = (
    "ADDRESS",
    "HOST",
    "SECTION",
    "LAYERS",
    "STATE",
    "MODEL",
    "DTYPE",
    "WEIGHTS",
    "KV FREE",
    "KV TOTAL",
    "MS/STEP",
    "RTT MS",
    "MEMORY",
    "LEASES",
    "ADAPTERS",
)
# What a worker is to the others that were named with it.
LOADING = "loading"
STAGE, SPARE, OTHER, ALONE = "stage", "spare", "not used", "-"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as it is now."""

    address: str
    facts: WorkerFacts
    status: Status
    rtt_s: float
    adapters: tuple[AdapterFacts, ...]  # that everybody may use
    state: str = ALONE  # in a chain of all that were named

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        facts, status = self.facts, self.status
        section = "-" if facts.section is None else f"{facts.section}/{facts.num_sections}"
        return (
            self.address,
            facts.host,
            section,
            f"{facts.start_layer}:{facts.end_layer} of {facts.num_layers}",
            self.state,
            facts.model,
            _held_as(facts),
            size(facts.stage_bytes),
            str(status.free_blocks),
            str(status.total_blocks),
            milliseconds(status.step_s),
            milliseconds(self.rtt_s),
            size(status.rss_bytes),
            str(status.leases),
            self._adapters(),
        )

    def as_json(self) -> dict[str, Any]:
        """Everything it said."""
        return {
            "address": self.address,
            "state": self.state,
            "rtt_s": self.rtt_s,
            "facts": msgspec.structs.asdict(self.facts),
            "status": msgspec.structs.asdict(self.status),
            "adapters": [msgspec.structs.asdict(it) for it in self.adapters],
        }

    def _adapters(self) -> str:
        """Names, and the memory of all, those that are being used up included."""
        names = [it.name for it in self.adapters]
        others = self.status.adapters - len(names)
        if others > 0:
            names.append(f"{others} unnamed")
        return f"{', '.join(names)} ({size(self.status.adapter_bytes)})" if names else "-"


def _held_as(facts: WorkerFacts) -> str:
    """How weights are held, and keys and values: "bfloat16 int4, kv int8"."""
    words = facts.dtype if facts.quantize == "none" else f"{facts.dtype} {facts.quantize}"
    return words if facts.kv_quantize == "none" else f"{words}, kv {facts.kv_quantize}"


@click.command()
@WORKERS
@key_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def workers(workers: str | None, keys: Keys, as_json: bool) -> None:
    """Show which worker holds what, and how it fares."""
    event_loop.run(show(workers, keys, as_json=as_json))


async def show(workers: str | None, keys: Keys, *, as_json: bool) -> None:
    """Print what the workers say of themselves, in the order of their layers.

    Raises:
        Error: one of them did not answer; those that did are printed all the same, and so are
            those that are still loading.
    """
    if workers is None:
        links, failures = await call_neighbours(Role.OBSERVER, keys), list[Error]()
    else:
        links, failures = await call_each(parse_addresses([workers]), Role.OBSERVER, keys)
    try:
        # Of several with one section, the first that was named is the stage.
        views = with_states(await look_at(links))
    finally:
        await close_all(links, "done")
    views.sort(key=lambda it: (it.facts.start_layer, it.state != STAGE, it.address))
    loading = [it for it in failures if isinstance(it, WorkerLoading)]
    if as_json:
        rows = [view.as_json() for view in views] + [loading_as_json(it) for it in loading]
        click.echo(json.dumps(rows, ensure_ascii=False))
    elif views or loading:
        rows_of_cells = [view.cells() for view in views] + [loading_cells(it) for it in loading]
        click.echo(table(TITLES, rows_of_cells))
    failed = next((it for it in failures if not isinstance(it, WorkerLoading)), None)
    if failed is not None:
        raise failed
    if not loading:  # else nobody knows yet what they will make up together
        remark_on_chain(views)


def loading_cells(worker: WorkerLoading) -> tuple[str, ...]:
    """A row of the table for one that says nothing yet but how far it is."""
    known = {"ADDRESS": worker.worker, "STATE": f"{LOADING} {worker.percent} %"}
    return tuple(known.get(title, "-") for title in TITLES)


def loading_as_json(worker: WorkerLoading) -> dict[str, Any]:
    """The same, with the keys of the others that it has."""
    return {"address": worker.worker, "state": LOADING, "percent": worker.percent}


async def look_at(links: Sequence[WorkerLink]) -> list[WorkerView]:
    """Ask all at once."""
    return await asyncio.gather(*map(_look, links))


def with_states(views: Sequence[WorkerView]) -> list[WorkerView]:
    """The same, each with what it would be to a manager: a stage, or one that waits."""
    try:
        chain = check_chain([Candidate(view.address, view.facts) for view in views])
    except Error:
        return list(views)
    states = {it.address: STAGE for it in chain.stages}
    states |= {it.address: SPARE for it in chain.spares}
    return [replace(view, state=states.get(view.address, OTHER)) for view in views]


def remark_on_chain(views: Sequence[WorkerView]) -> None:
    """Say on stderr why these workers could not run a model together, if so."""
    try:
        check_chain([Candidate(view.address, view.facts) for view in views])
    except Error as exc:
        say(str(exc))


async def _look(link: WorkerLink) -> WorkerView:
    status, rtt_s, adapters = await asyncio.gather(link.status(), link.ping(), link.adapters())
    return WorkerView(str(link.address), link.facts, status, rtt_s, tuple(adapters))
