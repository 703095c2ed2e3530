"""`manager report`: metrics files of `manager batch` side by side, as a table and as pictures.

Reads JSON that `manager.metrics` wrote; knows no pipeline. matplotlib loads with the first picture.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from manager.tables import size
from proto.errors import Error, UsageError

MAX_BYTES: Final = 64 * 1000 * 1000
PALETTE: Final = ("#d9466f", "#ee8a4a", "#3d8bd4", "#1f9d6b", "#8a63d2", "#b7791f")


@dataclass(frozen=True, slots=True)
class Run:
    """One metrics file."""

    name: str
    report: dict[str, Any]

    def number(self, *keys: str) -> float | None:
        """A value deep in it; None where it has none."""
        value: Any = self.report
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if is_number else None

    @property
    def workers(self) -> list[dict[str, Any]]:
        """What each said of itself."""
        found = self.report.get("workers")
        return [it for it in found if isinstance(it, dict)] if isinstance(found, list) else []


@click.command()
@click.argument("metrics", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write report.md and its pictures there. Default: print the table only.",
)
def report(metrics: tuple[Path, ...], output: Path | None) -> None:
    """Compare METRICS files, which `manager batch --metrics` wrote."""
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "pictures need matplotlib, not installed here: run `pip install 'comboio[report]'`, or "
            "leave out --output for the table alone."
        )
    runs = read_runs(metrics)
    text = table_of(runs)
    if output is None:
        click.echo(text)
        return
    pictures = {"throughput.png": throughput, "times.png": times, "workers.png": workers}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, draw in pictures.items():
            (output / name).write_bytes(_png(draw, runs))
        page = output / "report.md"
        page.write_text(_page(text, list(pictures)), encoding="utf-8")
    except OSError as exc:
        raise Error(f"cannot write into --output {output}: {exc.strerror}.") from exc
    click.echo(f"{page} and {len(pictures)} pictures", err=True)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All files, under names that tell them apart.

    Raises:
        UsageError: one is missing, or is no metrics file.
    """
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    return [Run(name, _read(path)) for name, path in zip(names, paths, strict=True)]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES} bytes: is it a metrics file?")
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {(exc.strerror or str(exc)).lower()}.") from exc
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{path} is no JSON: {exc}.") from exc
    if not isinstance(read, dict) or not {"wall_s", "tokens_per_s"} <= read.keys():
        raise UsageError(f"{path} is no metrics file: `manager batch --metrics FILE` writes one.")
    return read


# --- the table -------------------------------------------------------------------------------


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}".replace(",", " ")


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


ROWS: Final[tuple[tuple[str, tuple[str, ...], Callable[[float | None], str]], ...]] = (
    ("requests completed", ("completed",), _count),
    ("requests failed", ("failed",), _count),
    ("batch size", ("batch_size",), _count),
    ("prompt tokens", ("prompt_tokens",), _count),
    ("generated tokens", ("completion_tokens",), _count),
    ("wall time, s", ("wall_s",), _rate),
    ("generated tokens/s", ("tokens_per_s",), _rate),
    ("all tokens/s", ("total_tokens_per_s",), _rate),
    ("latency p50, s", ("latency_s", "p50"), _seconds),
    ("latency p95, s", ("latency_s", "p95"), _seconds),
    ("first token p50, s", ("ttft_s", "p50"), _seconds),
    ("first token p95, s", ("ttft_s", "p95"), _seconds),
    ("between tokens p50, s", ("inter_token_s", "p50"), _seconds),
    ("between tokens p95, s", ("inter_token_s", "p95"), _seconds),
)


def table_of(runs: Sequence[Run]) -> str:
    """A Markdown table, a column a run."""
    lines = [["", *(_cell(run.name) for run in runs)]]
    lines.append(["model", *(_cell(str(run.report.get("model", "–"))) for run in runs)])
    lines += [[title, *(show(run.number(*keys)) for run in runs)] for title, keys, show in ROWS]
    lines.append(["workers busy", *(_busy(run) for run in runs)])
    lines.append(["workers' memory", *(_memory(run) for run in runs)])
    widths = [max(len(line[at]) for line in lines) for at in range(len(runs) + 1)]
    drawn = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rule = "| " + " | ".join("-" * max(3, width) for width in widths) + " |"
    return "\n".join([drawn[0], rule, *drawn[1:]])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _busy(run: Run) -> str:
    shares = [worker.get("busy_share") for worker in run.workers]
    return ", ".join(f"{100 * it:.0f} %" for it in shares if isinstance(it, (int, float))) or "–"


def _memory(run: Run) -> str:
    found = [worker.get("peak_rss_bytes") for worker in run.workers]
    return ", ".join(size(it) for it in found if isinstance(it, (int, float))) or "–"


def _page(text: str, pictures: Sequence[str]) -> str:
    shown = [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(["# Metrics", text, *shown]) + "\n"


# --- pictures --------------------------------------------------------------------------------


def throughput(axes: Any, runs: Sequence[Run]) -> None:
    """Tokens a second, generated and read."""
    places = range(len(runs))
    made = [run.number("tokens_per_s") or 0.0 for run in runs]
    read = [run.number("prompt_tokens_per_s") or 0.0 for run in runs]
    bars = axes.bar(places, made, color=PALETTE[0], label="generated")
    axes.bar(places, read, bottom=made, color=PALETTE[1], alpha=0.55, label="prompts")
    axes.bar_label(bars, [f"{value:.1f}" for value in made], label_type="center", color="white")
    axes.set_ylabel("tokens/s")
    _name(axes, [run.name for run in runs])
    axes.legend()


def times(axes: Any, runs: Sequence[Run]) -> None:
    """What somebody who waits sees."""
    kinds = (
        ("latency_s", "whole text"),
        ("ttft_s", "first token"),
        ("inter_token_s", "each token"),
    )
    width = 0.8 / (2 * len(kinds))
    for at, (key, title) in enumerate(kinds):
        for half, quantile in enumerate(("p50", "p95")):
            values = [run.number(key, quantile) or 0.0 for run in runs]
            places = [place - 0.4 + width * (2 * at + half + 0.5) for place in range(len(runs))]
            shade = 1.0 if quantile == "p50" else 0.5
            axes.bar(
                places, values, width, color=PALETTE[at], alpha=shade, label=f"{title} {quantile}"
            )
    if any(run.number("latency_s", "p50") for run in runs):
        axes.set_yscale("log")
    axes.set_ylabel("seconds")
    _name(axes, [run.name for run in runs])
    axes.legend(fontsize="small", ncols=3)


def workers(axes: Any, runs: Sequence[Run]) -> None:
    """How busy each worker was."""
    names, shares, colors = [], [], []
    for at, run in enumerate(runs):
        for worker in run.workers:
            share = worker.get("busy_share")
            names.append(f"{run.name}\n{worker.get('layers', '')}")
            shares.append(100 * share if isinstance(share, (int, float)) else 0.0)
            colors.append(PALETTE[at % len(PALETTE)])
    axes.bar(range(len(names)), shares, color=colors)
    axes.set_ylim(0, 100)
    axes.set_ylabel("busy, % of the time")
    _name(axes, names)


def _name(axes: Any, names: Sequence[str]) -> None:
    turn = 0 if len(names) <= 6 else 60
    axes.set_xticks(range(len(names)), names, rotation=turn, fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _png(draw: Callable[[Any, Sequence[Run]], None], runs: Sequence[Run]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 1.6 * len(runs) + 4), 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot(), runs)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
