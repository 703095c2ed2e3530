"""What a worker counts, and the Status it makes of it.

Knows the clock, the process and the GPU; the counters are written by whoever does the counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import psutil

from proto.messages import Status
from worker import memory

# One sixteenth of every new sample: the last few dozen steps count.
STEP_WEIGHT: Final = 1 / 16


@dataclass(slots=True)
class Counters:
    """What happened since the start."""

    steps: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    step_s: float | None = None  # moving average of one step's compute
    received_bytes: int = 0  # of links that closed; open ones count for themselves
    sent_bytes: int = 0

    def count_step(self, num_tokens: int, compute_s: float) -> None:
        """One step was computed."""
        self.steps += 1
        self.tokens += num_tokens
        self.compute_s += compute_s
        last = compute_s if self.step_s is None else self.step_s
        self.step_s = last + STEP_WEIGHT * (compute_s - last)


def make_status(
    counters: Counters,
    *,
    received_bytes: int,
    sent_bytes: int,
    read_bytes: int,
    total_blocks: int,
    free_blocks: int,
    num_leases: int,
    device_name: str,
    num_adapters: int,
    adapter_bytes: int,
    room_bytes: int,
    working_s: float,
) -> Status:
    """The counters beside what the operating system says of this process now."""
    process = psutil.Process()
    times = process.cpu_times()
    gpu = memory.gpu(device_name)
    return Status(
        clock_s=time.monotonic(),
        steps=counters.steps,
        tokens=counters.tokens,
        compute_s=counters.compute_s,
        step_s=counters.step_s,
        cpu_s=times.user + times.system,
        rss_bytes=process.memory_info().rss,
        peak_rss_bytes=memory.peak_rss_bytes(),
        read_bytes=read_bytes,
        received_bytes=received_bytes,
        sent_bytes=sent_bytes,
        total_blocks=total_blocks,
        free_blocks=free_blocks,
        leases=num_leases,
        gpu_memory_bytes=None if gpu is None else gpu.memory_bytes,
        gpu_busy=None if gpu is None else gpu.busy,
        adapters=num_adapters,
        adapter_bytes=adapter_bytes,
        room_bytes=room_bytes,
        working_s=working_s,
    )
