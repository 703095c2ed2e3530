"""How much memory a process of this machine may still take.

Knows the machine, the control group around the process (Slurm, containers) and the process's own
limit (`ulimit -v`); no GPU, no model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import psutil

_CGROUP: Final = Path("/sys/fs/cgroup")


def free_cpu_bytes() -> int:
    """What can still be allocated: the least of what machine, control group and `ulimit` leave."""
    free = int(psutil.virtual_memory().available)
    for folder in _cgroup_folders():
        limit, used = _read_int(folder / "memory.max"), _read_int(folder / "memory.current")
        if limit is not None and used is not None:
            free = min(free, max(limit - used + _page_cache_bytes(folder), 0))
    return min(free, _unlimited_bytes(free))


def _unlimited_bytes(otherwise: int) -> int:
    """What `ulimit -v` leaves of the address space."""
    if sys.platform == "win32":
        return otherwise
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return otherwise
    return max(limit - int(psutil.Process().memory_info().vms), 0)


def _cgroup_folders() -> list[Path]:
    """This process's control group and those above it, where limits may stand (version 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        if line.startswith("0::/"):
            group = _CGROUP / line.removeprefix("0::/")
            return [group, *(p for p in group.parents if p.is_relative_to(_CGROUP))]
    return []


def _page_cache_bytes(folder: Path) -> int:
    """What the group is charged for files read before, and gives back when it is needed."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
