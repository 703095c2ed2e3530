"""What Prometheus is told of a worker, by the worker itself and by a manager that uses it. Pure.

Names as they stand behind `comboio_worker_`, and what each is.
"""

from __future__ import annotations

from typing import Final

from proto.messages import Status

COUNTERS: Final = {
    "steps": "Steps computed.",
    "tokens": "Tokens that went through.",
    "compute_seconds": "Time that torch worked.",
    "cpu_seconds": "Processor time.",
    "received_bytes": "Bytes that came in.",
    "sent_bytes": "Bytes that went out.",
}
GAUGES: Final = {
    "step_seconds": "One step's compute, a moving average.",
    "memory_bytes": "Resident memory.",
    "gpu_memory_bytes": "Memory of its GPU in use.",
    "kv_blocks_free": "KV blocks that are not leased.",
}


def figures(status: Status) -> dict[str, float | None]:
    """The value of each; None where there is none."""
    return {
        "steps": status.steps,
        "tokens": status.tokens,
        "compute_seconds": status.compute_s,
        "cpu_seconds": status.cpu_s,
        "received_bytes": status.received_bytes,
        "sent_bytes": status.sent_bytes,
        "step_seconds": status.step_s,
        "memory_bytes": status.rss_bytes,
        "gpu_memory_bytes": status.gpu_memory_bytes,
        "kv_blocks_free": status.free_blocks,
    }
