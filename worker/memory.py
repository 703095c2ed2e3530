"""How much memory this process may take, and what it takes already.

Knows the process and its GPU; what is free of the machine stands in `proto.free_memory`. Knows no
model: the size of a block comes from the caller.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from proto.errors import UsageError
from proto.free_memory import free_cpu_bytes

# Without --kv-memory: a share that leaves room for activations and for other programs of a small
# board. Workers of one chain on one machine divide it.
CPU_SHARE: Final = 0.4
CPU_LIMIT_BYTES: Final = 8 * 2**30
GPU_SHARE: Final = 0.7
# Of what a worker could have, KV and activations get at least so much when it takes other layers.
LEAST_KV_SHARE: Final = 0.1
# A worker without a model: Python, torch for the CPU and transformers, as its RSS shows.
PROCESS_BYTES: Final = 300 * 10**6
MAX_BLOCKS: Final = 2**31 - 1  # block tables are int32


@dataclass(frozen=True, slots=True)
class Gpu:
    """What this process holds of its GPU, and how busy the GPU is; None where unknown."""

    memory_bytes: int
    busy: float | None


def count_kv_blocks(
    asked_bytes: int | None, block_bytes: int, device_name: str, workers_here: int = 1
) -> int:
    """How many KV blocks this worker offers to its managers, all together.

    Raises:
        UsageError: the memory does not hold a single block.
    """
    kv_bytes = asked_bytes
    if kv_bytes is None:
        kv_bytes = default_kv_bytes(device_name) // workers_here
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 1:
        where = "free memory" if asked_bytes is None else "--kv-memory"
        raise UsageError(
            f"{where} of {kv_bytes} bytes holds no KV block: one takes {block_bytes} bytes over "
            "these layers. Pass a larger --kv-memory, or hold fewer layers."
        )
    return min(int(num_blocks), MAX_BLOCKS)


def default_kv_bytes(device_name: str) -> int:
    """The share of free memory that KV gets when nobody said how much."""
    if device_name.startswith("cuda"):
        import torch

        free_bytes, _ = torch.cuda.mem_get_info(_torch_device(device_name))
        return int(free_bytes * GPU_SHARE)
    return min(int(free_cpu_bytes() * CPU_SHARE), CPU_LIMIT_BYTES)


def room_for_weights(device_name: str, kv_memory_bytes: int | None) -> int:
    """Bytes of weights that this worker could hold, were those it holds and its KV gone.

    Args:
        kv_memory_bytes: what KV was given at the start; None: it takes what is left.
    """
    if device_name.startswith("cuda"):
        import torch

        device = _torch_device(device_name)
        free_bytes, _ = torch.cuda.mem_get_info(device)
        own_bytes = int(torch.cuda.memory_reserved(device))
    else:
        free_bytes = free_cpu_bytes()
        own_bytes = max(0, psutil.Process().memory_info().rss - PROCESS_BYTES)
    room = int((free_bytes + own_bytes) * (1 - LEAST_KV_SHARE))
    return room if kv_memory_bytes is None else max(0, free_bytes + own_bytes - kv_memory_bytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in Python, in torch's CPU allocator or on the GPU."""
    is_named = type(error).__name__ == "OutOfMemoryError"  # torch's own, without importing it
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, MemoryError) or is_named or "can't allocate memory" in str(error)


def peak_rss_bytes() -> int:
    """The most memory this process ever held.

    Linux's own count for this program's memory; `ru_maxrss` would hold its parent's peak as well.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return int(psutil.Process().memory_info().rss)
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(peak[1]) * 1024 if peak else int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Return to the system what was freed and is kept in reserve; does nothing without glibc."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _find_malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return None
    return found


_malloc_trim: Final = _find_malloc_trim()


def gpu(device_name: str) -> Gpu | None:
    """The GPU's numbers, None on a CPU."""
    if not device_name.startswith("cuda"):
        return None
    import torch

    device = _torch_device(device_name)
    try:
        busy: float | None = torch.cuda.utilization(device) / 100
    except Exception:  # no pynvml, or a driver that does not tell: the rest is still worth having
        busy = None
    return Gpu(int(torch.cuda.memory_reserved(device)), busy)


def _torch_device(device_name: str) -> str:
    """ "cuda:0" of "cuda:0 NVIDIA H200"."""
    return device_name.partition(" ")[0]
