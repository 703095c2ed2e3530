"""Rows of the table of targets: what was measured, what against, and whether that is enough.

Every measurement ends in some `Row`s; `bench/all.py` collects those of all files in one table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.measuring.machine import description
from manager.bench_load import Load

FORMAT: Final = 1  # of the JSON


@dataclass(frozen=True)
class Row:
    """One figure and its target."""

    what: str  # "8 streams, decode"
    case: str  # "llama bf16"
    unit: str  # of both figures: "tokens/s"
    ours: float | None  # None: not measured; `note` says why
    against: str = ""  # what the other figure is
    theirs: float | None = None
    target: float | None = None  # of the ratio, or of our figure where there is no other
    at_most: bool = False  # the target is an upper limit
    spread: tuple[float, float] | None = None  # of the ratio, or of our figure, over the rounds
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        if self.ours is None or not self.theirs:
            return None
        return self.ours / self.theirs

    @property
    def value(self) -> float | None:
        """What the target is about."""
        return self.ratio if self.against else self.ours

    @property
    def share(self) -> float | None:
        """How much of the target is reached; 1 and more is enough."""
        if self.value is None or self.target is None:
            return None
        if self.at_most:
            return self.target / max(self.value, 1e-9)
        return self.value / self.target

    @property
    def verdict(self) -> str:
        """For people."""
        if self.ours is None:
            return "not measured"
        if self.share is None:
            return "measured"
        return "reached" if self.share >= 1 else f"{self.share:.2f} of it"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "share": self.share, "verdict": self.verdict}


def row_of(values: dict[str, Any]) -> Row:
    """What `Row.as_json` made."""
    own = {name: value for name, value in values.items() if name in Row.__dataclass_fields__}
    if own.get("spread"):
        own["spread"] = tuple(own["spread"])
    return Row(**own)


def ratio_spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """The lowest and highest ratio that a single round could have shown."""
    if not ours or not theirs:
        return None
    return min(ours) / max(theirs), max(ours) / min(theirs)


def show(rows: Sequence[Row], *, title: str, notes: Sequence[str] = ()) -> None:
    """The table, and below it what one should know."""
    table = Table("what", "model", "ours", "against", "theirs", "ratio", "target", "", title=title)
    for row in rows:
        table.add_row(
            row.what,
            row.case,
            _number(row.ours, row.unit),
            row.against,
            _number(row.theirs, row.unit),
            _ratio(row),
            _target(row),
            row.verdict if row.ours is not None or not row.note else row.note,
            style=None if row.share is None or row.share >= 1 else "yellow",
        )
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    for note in [*(row.note for row in rows if row.note and row.ours is not None), *notes]:
        print(note)


def publish(
    rows: Sequence[Row],
    *,
    title: str,
    load: Load,
    json_file: Path | None,
    notes: Sequence[str] = (),
    **more: Any,
) -> None:
    """Show the rows, and write them where they were asked for."""
    notes = [*notes, *([load.warning] if load.warning else [])]
    show(rows, title=title, notes=notes)
    if json_file is None:
        return
    content = {
        "format": FORMAT,
        "title": title,
        "machine": description(),
        "load": load.as_json(),
        "notes": notes,
        "rows": [row.as_json() for row in rows],
        **more,
    }
    try:
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as exc:
        raise SystemExit(f"--json {json_file} cannot be written: {exc.strerror}.") from exc


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{digits(value)} {unit}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "-" if row.spread is None else f"({digits(row.spread[0])}-{digits(row.spread[1])})"
    spread = f" ({digits(row.spread[0])}-{digits(row.spread[1])})" if row.spread else ""
    return f"{digits(row.ratio)}{spread}"


def _target(row: Row) -> str:
    if row.target is None:
        return "-"
    unit = "x" if row.against else f" {row.unit}"
    return f"{'<=' if row.at_most else '>='} {row.target:g}{unit}"


def digits(value: float) -> str:
    """Three of them that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
