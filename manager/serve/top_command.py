"""`manager top`: the pipeline of a server, live, as text."""

from __future__ import annotations

import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manager import event_loop
from manager.options import WorkersOwn
from manager.serve.client import DEFAULT_URL, ApiClient
from manager.tables import milliseconds, size

if TYPE_CHECKING:
    from rich.console import RenderableType

SERVER_URL = click.option(
    "--server",
    cls=WorkersOwn,  # the setting of this name is a llama-server's
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    help="Of `manager serve`.",
)
KEY_FILE = click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The API key that it asks for. Default: OPENAI_API_KEY.",
)


@click.command()
@SERVER_URL
@KEY_FILE
@click.option("--once", is_flag=True, help="Print what is there now, and leave.")
def top(server: str, api_key_file: Path | None, once: bool) -> None:
    """Show the workers of a server: layers, busy share, ms per step, memory; q or Ctrl-C leaves."""
    event_loop.run(show(ApiClient(server, api_key_file), once=once or not sys.stdout.isatty()))


async def show(client: ApiClient, *, once: bool) -> None:
    """Draw every snapshot.

    Raises:
        Error: the server is not there, or goes away.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console()
    async with aclosing(client.events("/live")) as snapshots:
        if once:
            first = None
            async for snapshot in snapshots:
                if first is not None:  # rates need two
                    console.print(picture(snapshot, []))
                    return
                first = snapshot
            return
        rates: list[float] = []
        with Live(console=console, screen=True, auto_refresh=False) as live:
            async for snapshot in snapshots:
                rates = [*rates[-119:], snapshot["tokens_per_s"]]
                live.update(picture(snapshot, rates), refresh=True)


def picture(snapshot: dict[str, Any], rates: list[float]) -> RenderableType:
    """One snapshot, drawn."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    color = {"ready": "green", "lost": "red"}.get(snapshot["state"], "yellow")
    used = snapshot["kv_blocks"] - snapshot["kv_blocks_free"]
    head = Text.assemble(
        ("● ", color),
        (f"{snapshot['state']}  ", f"bold {color}"),
        (f"{snapshot['model'] or ''}   ", "bold"),
        (f"{snapshot['tokens_per_s']:.1f} tokens/s", "bold magenta"),
        f"   running {snapshot['running']}   queue {snapshot['waiting']}"
        f"   in flight {snapshot['steps_in_flight']}   KV {used}/{snapshot['kv_blocks']} blocks",
    )
    table = Table(expand=True, box=None, header_style="dim")
    for title in ("WORKER", "HOST", "LAYERS", "BUSY", "", "MS/STEP", "STEPS/S", "RTT MS", "MEMORY"):
        right = title in ("MS/STEP", "STEPS/S", "RTT MS", "MEMORY")
        table.add_column(title, justify="right" if right else "left")
    for worker in snapshot["workers"]:
        busy = worker["busy"]
        table.add_row(
            worker["address"],
            worker["host"],
            f"{worker['start_layer']}:{worker['end_layer']}",
            "lost" if worker["lost"] else f"{busy:.0%}",
            Text("█" * round(16 * busy) + "░" * (16 - round(16 * busy)), style="magenta"),
            milliseconds(worker["step_s"]),
            f"{worker['steps_per_s']:.1f}",
            milliseconds(worker["rtt_s"]),
            size(worker["gpu_memory_bytes"] or worker["memory_bytes"]),
            style="red" if worker["lost"] else "",
        )
    parts: list[RenderableType] = [head]
    if rates:
        parts.append(Text(_sparks(rates), style="magenta"))
    parts += [Text(), table]
    if snapshot["reason"]:
        parts.append(Text(f"\n{snapshot['reason']}", style=color))
    return Panel(Group(*parts), title="comboio", border_style=color)


def _sparks(rates: list[float]) -> str:
    most = max(*rates, 1.0)
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * rate / most)] for rate in rates)
