"""What else the machine does while something is measured.

A figure of a machine that does other work is a figure of the other work too: every run notes what
share of the cores went to processes that are not ours, and `Load.warning` says so. Knows this
machine only, not those of workers elsewhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

BUSY: Final = 0.05  # of the machine; above it the figures are marked


@dataclass
class Load:
    """What else ran, over all runs that were measured."""

    before: float = field(default_factory=lambda: os.getloadavg()[0])
    shares: list[float] = field(default_factory=list)  # of the machine, a run each

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the others' share while the block runs."""
        begun_s, total_s, own_s = time.monotonic(), _busy_s(), _own_s()
        yield
        seconds = time.monotonic() - begun_s
        others_s = _busy_s() - total_s - (_own_s() - own_s)
        self.shares.append(max(0.0, others_s / (seconds * (os.cpu_count() or 1))))

    @property
    def others(self) -> float:
        """Their largest share in any run."""
        return max(self.shares, default=0.0)

    @property
    def warning(self) -> str | None:
        """A sentence where the machine was busy."""
        busy = sum(share > BUSY for share in self.shares)
        if not busy:
            return None
        return (
            f"Other processes took up to {100 * self.others:.0f} % of this machine in "
            f"{busy} of {len(self.shares)} runs: ratios may hold, absolute figures do not."
        )

    def as_json(self) -> dict[str, Any]:
        """For whoever judges the figures later."""
        return {
            "loadavg_before": self.before,
            "others_share_max": self.others,
            "runs": len(self.shares),
            "busy_runs": sum(share > BUSY for share in self.shares),
        }


def _busy_s() -> float:
    """CPU seconds of the machine: without idle, waiting for disks, and what guests took twice."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))


def _own_s() -> float:
    """CPU seconds of this process and its children, those that ended included."""
    me = psutil.Process()
    total = float(sum(me.cpu_times()[:4]))
    for child in me.children(recursive=True):
        try:
            total += sum(child.cpu_times()[:2])
        except psutil.Error:
            pass
    return total
