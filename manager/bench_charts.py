"""Charts of what was measured, as PNG files. Needs matplotlib, which an extra brings.

Knows runs and trace files, no pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from manager.bench_rounds import Runs
from manager.finetune.extras import require
from manager.metrics import quantile
from proto.errors import Error, UsageError

DPI: Final = 120
SIZE: Final = (7.0, 4.2)  # inches
GANTT_US: Final = 400_000.0  # at most so much of a trace, at its end
COMPUTE: Final = "compute"


def check(folder: Path) -> None:
    """Make the folder, and see that charts can be drawn.

    Raises:
        UsageError: they cannot.
    """
    require("matplotlib", "--charts", "bench")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UsageError(f"--charts {folder} cannot be made: {exc.strerror}.") from exc


def draw_all(folder: Path, runs: Runs, *, title: str, prefix: str = "") -> list[Path]:
    """Tokens a second, latency and busy share against streams; the files that were written."""
    by_name: dict[str, list[tuple[int, str]]] = {}
    for (case, name), found in runs.found.items():
        by_name.setdefault(name, []).append((len(found[0].times_s), case))
    for cases in by_name.values():
        cases.sort()
    drawn = [
        (f"{prefix}tokens-per-second.png", lambda axes: _draw_rates(axes, runs, by_name)),
        (f"{prefix}latency.png", lambda axes: _draw_latency(axes, runs, by_name)),
        (f"{prefix}busy.png", lambda axes: _draw_busy(axes, runs, by_name)),
    ]
    return [_save(folder / file, draw, title) for file, draw in drawn]


def draw_gantt(path: Path, trace: Path, *, title: str) -> Path:
    """When each stage computed which step, at the end of a trace.

    Raises:
        Error: the trace cannot be read.
    """
    try:
        text = trace.read_text(encoding="utf-8").rstrip().rstrip(",")
        events = json.loads(text if text.endswith("]") else f"{text}\n]")
    except (OSError, ValueError) as exc:
        raise Error(f"the trace {trace} cannot be read: {exc}") from exc
    names = {it["pid"]: it["args"]["name"] for it in events if it["name"] == "process_name"}
    slices = [it for it in events if it["ph"] == "X" and it.get("cat") == COMPUTE]
    return _save(path, lambda axes: _draw_gantt(axes, slices, names), title)


# --- what is drawn ----------------------------------------------------------------------------

Places = Mapping[str, Sequence[tuple[int, str]]]  # contestant -> (streams, case), in order


def _draw_rates(axes: Any, runs: Runs, places: Places) -> None:
    for name, cases in places.items():
        shown = [(streams, runs.median(case, name, "tokens_per_s")) for streams, case in cases]
        axes.plot(*zip(*shown, strict=True), marker="o", label=name)
    _against_streams(axes, places, "tokens/s, prompts included")


def _draw_latency(axes: Any, runs: Runs, places: Places) -> None:
    for name, cases in places.items():
        gaps = [
            (streams, [gap for run in runs.found[case, name] for gap in run.gaps_s])
            for streams, case in cases
        ]
        known = [(streams, it) for streams, it in gaps if it]
        if not known:
            continue
        streams = [it for it, _ in known]
        line = axes.plot(
            streams, [_ms(it, 0.5) for _, it in known], marker="o", label=f"{name}, p50"
        )[0]
        axes.plot(
            streams,
            [_ms(it, 0.95) for _, it in known],
            linestyle="--",
            color=line.get_color(),
            label=f"{name}, p95",
        )
    _against_streams(axes, places, "ms between two tokens of a stream")


def _draw_busy(axes: Any, runs: Runs, places: Places) -> None:
    for name, cases in places.items():
        shares = [(streams, runs.busy(case, name)) for streams, case in cases]
        known = [(streams, it) for streams, it in shares if it]
        for index in range(len(known[0][1]) if known else 0):
            heights = [100 * it[index] for _, it in known]
            axes.plot([it for it, _ in known], heights, marker="o", label=f"{name}, worker {index}")
    _against_streams(axes, places, "% of the time that torch computed")
    axes.set_ylim(0, 102)


def _draw_gantt(axes: Any, slices: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> None:
    end_us = max((it["ts"] + it["dur"] for it in slices), default=0.0)
    start_us = max(0.0, end_us - GANTT_US)
    pids = sorted({it["pid"] for it in slices})
    for it in slices:
        if it["ts"] >= start_us:
            axes.broken_barh(
                [((it["ts"] - start_us) / 1e3, it["dur"] / 1e3)],
                (pids.index(it["pid"]) - 0.4, 0.8),
                facecolors=f"C{it['args']['step'] % 10}",
            )
    axes.invert_yaxis()  # the first stage on top
    axes.set_yticks(range(len(pids)), [names.get(pid, str(pid)) for pid in pids])
    axes.set_xlabel("ms; a colour is a step")


def _against_streams(axes: Any, places: Places, what: str) -> None:
    axes.set_xlabel("streams")
    axes.set_ylabel(what)
    axes.set_xticks(sorted({streams for cases in places.values() for streams, _ in cases}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def _save(path: Path, draw: Callable[[Any], None], title: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10)
    try:
        figure.savefig(path)
    except OSError as exc:
        raise Error(f"the chart {path} cannot be written: {exc.strerror}") from exc
    return path


def _ms(values: Sequence[float], share: float) -> float:
    return 1e3 * (quantile(values, share) or 0.0)
