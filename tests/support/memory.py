"""How much memory some code needs at its peak, measured in a process of its own.

A forked child starts with its parent's `ru_maxrss`, so the kernel's high-water mark is read and
reset instead; only Linux has that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import sys
def resident(field):
    with open("/proc/self/status") as lines:
        return next(int(it.split()[1]) * 1024 for it in lines if it.startswith(field + ":"))
def start():
    global _before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    _before = resident("VmRSS")
def growth():
    return resident("VmHWM") - _before
"""


def measured(script: str, *args: object) -> list[int]:
    """The whole numbers that a script prints; it may call start(), and growth() in bytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: /proc/self/clear_refs")
    result = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script, *map(str, args)],
        cwd=ROOT,
        # Left to itself, glibc keeps freed memory back, more or less of it from run to run.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [int(word) for word in result.stdout.split()]


@contextmanager
def growth_limit(most_bytes: int) -> Iterator[None]:
    """Fail where this process takes more memory within the block than it had, for a moment even."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    reset.write_text("5")  # the highest that was seen is what there is now
    before = _kilobytes(status, "VmRSS")
    yield
    growth = (_kilobytes(status, "VmHWM") - before) * 1024
    assert growth < most_bytes, f"{growth} bytes were taken"


def _kilobytes(status: Path, name: str) -> int:
    line = next(it for it in status.read_text().splitlines() if it.startswith(f"{name}:"))
    return int(line.split()[1])
