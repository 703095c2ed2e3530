"""What `manager bench` found, as a table and as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from manager.bench_load import Load
from manager.bench_rounds import Case, Runs
from manager.metrics import quantiles, versions
from proto.errors import Error

FORMAT: Final = 1  # of the JSON


def print_table(cases: Sequence[Case], names: Sequence[str], runs: Runs, title: str) -> None:
    """A row for every case and contestant, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in (
        *("streams", "", "tokens/s", "decoding", "first token s", "between tokens ms"),
        *("prompt tokens/s", "busy"),
    ):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for case in cases:
        for name in names:
            if (case.name, name) in runs.found:
                table.add_row(*_cells(case, name, runs, is_first=name == names[0]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    console.print(
        "tokens/s: all new tokens, prompts' time included; decoding: while every stream decodes; "
        "p50 and p95.",
        highlight=False,
    )


def _cells(case: Case, name: str, runs: Runs, *, is_first: bool) -> tuple[str, ...]:
    found = runs.found[case.name, name]
    first = quantiles([at_s for run in found for at_s in run.first_s])
    gaps = quantiles([gap for run in found for gap in run.gaps_s])
    busy = runs.busy(case.name, name)
    return (
        str(case.streams) if is_first else "",
        name,
        _figure(runs.median(case.name, name, "tokens_per_s")),
        _figure(runs.median(case.name, name, "decode_tokens_per_s")),
        f"{_figure(first['p50'])} / {_figure(first['p95'])}",
        f"{_figure(gaps['p50'], 1e3)} / {_figure(gaps['p95'], 1e3)}",
        _figure(runs.median(case.name, name, "prompt_tokens_per_s")),
        ", ".join(f"{100 * share:.0f} %" for share in busy) or "-",
    )


def _figure(value: float | None, times: float = 1.0) -> str:
    """Three digits that mean something."""
    if value is None:
        return "-"
    return f"{value * times:.0f}" if abs(value * times) >= 100 else f"{value * times:.3g}"


def as_json(
    runs: Runs, load: Load, *, identity: dict[str, Any], workers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "format": FORMAT,
        **identity,
        "workers": workers,
        "runs": runs.as_json(),
        "failures": runs.failures,
        "load": load.as_json(),
        "versions": versions(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises Error: it cannot be written."""
    try:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as exc:
        raise Error(f"cannot write --json {path}: {exc.strerror}") from exc
