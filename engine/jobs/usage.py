"""What this process takes of the machine: memory now and at its peak, and how busy the GPU is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import torch

from engine.jobs.events import Memory


def memory(device: torch.device) -> Memory:
    """The figures of now."""
    rss_bytes = int(psutil.Process().memory_info().rss)
    peak_rss_bytes = max(rss_bytes, _peak_rss_bytes())
    if device.type != "cuda":
        return Memory(rss_bytes=rss_bytes, peak_rss_bytes=peak_rss_bytes)
    return Memory(
        rss_bytes=rss_bytes,
        peak_rss_bytes=peak_rss_bytes,
        gpu_bytes=int(torch.cuda.memory_allocated(device)),
        peak_gpu_bytes=int(torch.cuda.max_memory_allocated(device)),
        gpu_reserved_bytes=int(torch.cuda.memory_reserved(device)),
        gpu_busy=_gpu_busy(device),
    )


def _peak_rss_bytes() -> int:
    """Linux's own count for this program; 0 elsewhere, where the present one has to do."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else 0


def _gpu_busy(device: Any) -> float | None:
    try:
        return float(torch.cuda.utilization(device)) / 100
    except Exception:  # no pynvml, or a driver that does not tell: the rest is still worth having
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, in torch's CPU allocator or on the GPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
