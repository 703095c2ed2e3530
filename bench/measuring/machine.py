"""What the machine is, and which cores are whose."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil


def cores(count: int) -> list[set[int]]:
    """One core each for so many processes; they share where there are fewer cores."""
    own = sorted(os.sched_getaffinity(0))
    return [{own[index % len(own)]} for index in range(count)]


@contextmanager
def pinned(to: set[int]) -> Iterator[None]:
    """A process that is started in the block may run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def description() -> dict[str, Any]:
    """What was measured on."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "flags": sorted(cpu_flags() & INTERESTING),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


INTERESTING: Final = {
    *("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
}


def cpu_flags() -> set[str]:
    return set(_cpu_line("flags", "Features").split())


def cpu_name() -> str:
    name = _cpu_line("model name") or platform.processor() or platform.machine()
    family, model = _cpu_line("cpu family"), _cpu_line("model\t")
    return f"{name} (family {family} model {model})" if family else name


def _cpu_line(*names: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(names))
    return next(found, "")
