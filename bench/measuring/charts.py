"""The comparison's charts: those of `manager bench`, a set for each number of bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from manager import bench_charts
from manager.bench_rounds import Runs


def draw_comparison(folder: Path, shape: str, runs: Mapping[str, Runs]) -> list[str]:
    """Sentences on what was written."""
    written = list[Path]()
    for bits, found in runs.items():
        # Of the same prompts: the long one would be a second point at one stream.
        alike = Runs({key: runs for key, runs in found.found.items() if "stream" in key[0]})
        if alike.found:
            written += bench_charts.draw_all(
                folder, alike, title=f"{shape}, {bits}", prefix=f"{shape}-{bits}-"
            )
        trace = trace_file(folder, shape, bits)
        if trace.is_file():
            path = folder / f"{shape}-{bits}-steps.png"
            title = f"{shape}, {bits}: steps of 8 streams on two workers"
            written.append(bench_charts.draw_gantt(path, trace, title=title))
    return [f"charts: {', '.join(str(path) for path in written)}"] if written else []


def trace_file(folder: Path, shape: str, bits: str) -> Path:
    """Where the trace of these bits lies, for the Gantt chart and for ui.perfetto.dev."""
    return folder / f"{shape}-{bits}-trace.json"
