"""`manager replay`: have a scheduler decide anew what a log says that it decided.

Whatever faults a run went through are in the log's events; no worker and no model is needed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from engine.event_log import replay as replay_lines
from proto.errors import Error, RemoteProtocolError, UsageError


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--show", is_flag=True, help="Print every event, and the commands that come of it.")
def replay(file: Path, show: bool) -> None:
    """Replay the scheduler's events of FILE, which --event-log wrote.

    Exit code 1 when the scheduler does not say the same to one of them.
    """
    counts: Counter[str] = Counter()
    try:
        with file.open(encoding="utf-8") as lines:
            for it in replay_lines(lines):
                counts[type(it.event).__name__] += 1
                counts["commands"] += len(it.commands)
                if show:
                    click.echo(f"{it.line} {it.event}")
                    for command in it.commands:
                        click.echo(f"    {command}")
                if not it.is_same:
                    raise Error(
                        f"{file}, line {it.line}: the scheduler says something else to this event "
                        "than it said then; --show prints it"
                    )
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{file} is no log of scheduler events: it is not UTF-8.") from exc
    except RemoteProtocolError as exc:
        raise Error(f"{file}: {exc}") from exc
    commands = counts.pop("commands")
    kinds = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    click.echo(f"{sum(counts.values())} events ({kinds}), {commands} commands: all the same")
