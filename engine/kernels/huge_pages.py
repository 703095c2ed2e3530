"""Memory for packed weights, in huge pages wherever the system has them.

A core reads it a third faster than small pages. Matrices lie one behind the other in large
mappings, so that small ones, and the ends of large ones, are in huge pages too; what is mapped and
not written takes no memory. A mapping goes when the last tensor in it goes.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from typing import Final

import torch
from torch import Tensor

# What one entry of the processor's table of addresses covers at most, on x86-64 and most of Arm.
HUGE_PAGE: Final = 2 * 2**20
# Mapped at a time. What needs a good part of that has a mapping of its own.
MAPPED_BYTES: Final = 256 * 2**20
# Smaller ones are left to torch.
_LEAST_BYTES: Final = 64 * 2**10
_CACHE_LINE: Final = 64
_ADVICE: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)


class _Open:
    """The mapping whose end is free still. Only its tensors keep it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.block: weakref.ref[mmap.mmap] | None = None
        self.free_from = 0


_open = _Open()


def new_mapping() -> None:
    """Have what comes next begin a mapping of its own, which then goes when all of that goes."""
    with _open.lock:
        _open.block = None


def memory(size: int) -> Tensor:
    """Unwritten bytes: (size,) uint8, at the beginning of a cache line."""
    if _ADVICE is None or size < _LEAST_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    try:
        if size > MAPPED_BYTES // 4:
            block, start = _mapped(size)
        else:
            block, start = _part(size)
    except OSError:  # a limit on what may be mapped; what is asked for may still fit
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(block, dtype=torch.uint8, count=size, offset=start)


def _part(size: int) -> tuple[mmap.mmap, int]:
    """The next bytes of the open mapping, or of a new one: the mapping, and where in it."""
    with _open.lock:
        block = None if _open.block is None else _open.block()
        if block is None or _open.free_from + size > len(block):
            block, _open.free_from = _mapped(MAPPED_BYTES)
            _open.block = weakref.ref(block)
        start = _open.free_from
        _open.free_from += -(-size // _CACHE_LINE) * _CACHE_LINE
        return block, start


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """A mapping, and where in it the first of its huge pages begins, from which `size` fit."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    block = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
    start = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    assert _ADVICE is not None
    with contextlib.suppress(OSError):
        # Whole ones alone, so that no more is taken than is asked for.
        block.madvise(_ADVICE, start, size // HUGE_PAGE * HUGE_PAGE)
    return block, start
