"""`manager adapters`: which LoRA adapters the workers hold; add one, drop one, while they run.

The folders lie on the workers' machines. What becomes of an adapter on several workers at once
stands in `manager.adapter_loading`; this shows it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import click
import msgspec

from manager import event_loop
from manager.adapter_loading import add_everywhere, check_same, drop_everywhere
from manager.addresses import parse_addresses
from manager.cli import CONTEXT_SETTINGS, LazyGroup, say
from manager.links import WorkerLink
from manager.options import WORKERS, key_options
from manager.tables import size, table
from manager.topology import call_all, call_neighbours, close_all
from proto.adapter_name import check_adapter_name, parse_adapter
from proto.errors import AdapterError, UsageError
from proto.keys import Keys
from proto.messages import AdapterFacts, Role

TITLES: Final = ("ADAPTER", "WORKER", "LAYERS", "MODULES", "MEMORY", "LEASES", "CONTENT", "FOLDER")

T = TypeVar("T")


class _Group(LazyGroup):
    """Without the name of a subcommand, it lists."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not {*self.list_commands(ctx), *ctx.help_option_names} & set(args):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.command("list")
@WORKERS
@key_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def list_command(workers: str | None, keys: Keys, as_json: bool) -> None:
    """Show which adapters each worker holds, and how many managers use them."""
    event_loop.run(show(workers, keys, as_json=as_json))


@click.command("add")
@click.argument("adapter", metavar="NAME=DIR")
@WORKERS
@key_options
def add_command(adapter: str, workers: str | None, keys: Keys) -> None:
    """Load an adapter on all workers, or on none; requests can name it from then on.

    DIR is a folder on the workers' machines, the same path on each.
    """
    name, folder = parse_adapter(adapter)
    event_loop.run(add(name, _absolute(folder), workers, keys))


@click.command("drop")
@click.argument("name")
@WORKERS
@key_options
def drop_command(name: str, workers: str | None, keys: Keys) -> None:
    """Take an adapter away from all workers. Sequences that use it run to their end with it."""
    event_loop.run(drop(check_adapter_name(name), workers, keys))


COMMANDS: Final = {
    "list": ("manager.adapters", "list_command", "Show which adapters each worker holds."),
    "add": ("manager.adapters", "add_command", "Load one on all workers, while they run."),
    "drop": ("manager.adapters", "drop_command", "Take one away from all workers."),
}

adapters = _Group(
    name="adapters",
    commands=COMMANDS,
    context_settings=CONTEXT_SETTINGS,
    help="Show the LoRA adapters that the workers hold; add and drop some while they run.",
)


async def show(workers: str | None, keys: Keys, *, as_json: bool) -> None:
    """Print what each worker holds; a remark on stderr where they do not hold the same.

    Raises:
        Error: a worker does not answer.
    """

    async def look(links: Sequence[WorkerLink]) -> list[list[AdapterFacts]]:
        return await asyncio.gather(*(link.adapters() for link in links))

    links, held = await _with_links(look, workers, keys, Role.OBSERVER)
    if as_json:
        found = [
            {"address": str(link.address), "adapters": [msgspec.structs.asdict(it) for it in its]}
            for link, its in zip(links, held, strict=True)
        ]
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    rows = [
        _cells(link, facts)
        for name in sorted({facts.name for its in held for facts in its})
        for link, its in zip(links, held, strict=True)
        for facts in its
        if facts.name == name
    ]
    if rows:
        click.echo(table(TITLES, rows))
        _remark(links, held)
    else:
        say("the workers hold no adapter: add one with `manager adapters add NAME=DIR`.")


async def add(name: str, folder: str, workers: str | None, keys: Keys) -> None:
    """Load one on all workers.

    Raises:
        AdapterError: a worker cannot; then none has it.
        Error: a worker does not answer.
    """
    links, held = await _with_links(
        lambda links: add_everywhere(links, name, folder), workers, keys, Role.MANAGER
    )
    num_modules = sum(it.num_modules for it in held)
    if not num_modules:
        say(f"none of these workers' layers is adapted by {name}")
    click.echo(
        f"{name} is on {_count(len(links), 'worker')}: {_count(num_modules, 'module')} adapted, "
        f"{size(sum(it.num_bytes for it in held))}"
    )


async def drop(name: str, workers: str | None, keys: Keys) -> None:
    """Take one away from all workers.

    Raises:
        AdapterError: none holds it.
        Error: a worker does not answer.
    """
    _, dropped = await _with_links(
        lambda links: drop_everywhere(links, name), workers, keys, Role.MANAGER
    )
    used = max(it.leases for it in dropped)
    later = f"; {_count(used, 'manager')} still use it, until their sequences end" if used else ""
    click.echo(f"{name} is dropped from {_count(len(dropped), 'worker')}{later}")


async def _with_links(
    act: Callable[[Sequence[WorkerLink]], Awaitable[T]],
    workers: str | None,
    keys: Keys,
    role: Role,
) -> tuple[list[WorkerLink], T]:
    """Call the workers, act, and leave; in the order of their layers."""
    if workers is None:
        links = await call_neighbours(role, keys)
    else:
        links = await call_all(parse_addresses([workers]), role, keys)
    links = sorted(links, key=lambda it: (it.facts.start_layer, str(it.address)))
    try:
        return links, await act(links)
    finally:
        await close_all(links, "done")


def _cells(link: WorkerLink, adapter: AdapterFacts) -> tuple[str, ...]:
    facts = link.facts
    return (
        adapter.name,
        str(link.address),
        f"{facts.start_layer}:{facts.end_layer} of {facts.num_layers}",
        str(adapter.num_modules),
        size(adapter.num_bytes),
        str(adapter.leases),
        adapter.fingerprint[:8],
        adapter.path,
    )


def _remark(links: Sequence[WorkerLink], held: Sequence[Sequence[AdapterFacts]]) -> None:
    """Say which adapters no request can use, and why."""
    by_link = [{it.name: it for it in its} for its in held]
    for name in sorted({name for its in by_link for name in its}):
        without = [
            str(link.address) for link, its in zip(links, by_link, strict=True) if name not in its
        ]
        if without:
            say(f"{name} is missing on {', '.join(without)}: add it there as well, or drop it.")
            continue
        try:
            check_same(links, [its[name] for its in by_link])
        except AdapterError as exc:
            say(str(exc))


def _absolute(folder: str) -> str:
    """A path that means the same wherever a worker was started.

    Raises:
        UsageError: it is relative, and nothing is there on this machine.
    """
    path = Path(folder)
    if folder.startswith("~") or path.is_absolute():
        return folder
    if not path.exists():
        raise UsageError(
            f"{folder} is not on this machine: give the absolute path that it has on the workers'."
        )
    return str(path.absolute())


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
