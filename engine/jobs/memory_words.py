"""Say in words what to change where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from engine.jobs import usage
from engine.jobs.base_model import Placement
from engine.jobs.batches import MicroBatch
from engine.jobs.settings import TrainingSettings
from engine.jobs.token_rows import TokenRows
from proto.errors import Error

GB: Final = 10**9


@contextmanager
def memory_in_words(
    settings: TrainingSettings, rows: TokenRows, batch: MicroBatch, placement: Placement
) -> Iterator[None]:
    """Turn "out of memory" into what to change, with the numbers of this run."""
    try:
        yield
    except Exception as exc:
        if not usage.is_out_of_memory(exc):
            raise
        raise Error(_memory_sentence(settings, rows, batch, placement)) from exc


def _memory_sentence(
    settings: TrainingSettings, rows: TokenRows, batch: MicroBatch, placement: Placement
) -> str:
    width = max((len(rows[index].input_ids) for index in batch if index is not None), default=0)
    took = usage.memory(placement.device)
    peak = took.peak_gpu_bytes if took.peak_gpu_bytes is not None else took.peak_rss_bytes
    knobs = []
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        same = settings.accumulation * settings.batch_size // half
        knobs.append(
            f"--per-device-train-batch-size {half} --gradient-accumulation-steps {same} "
            "(the same steps)"
        )
    knobs.append(f"--max-length {max(width // 2, 2)}")
    if not settings.gradient_checkpointing:
        knobs.append("--gradient-checkpointing")
    if placement.dtype is torch.float32:
        knobs.append("--dtype bfloat16")
    if placement.device.type == "cuda" and settings.quantize == "none":
        knobs.append("--quantize 4bit")
    return (
        f"out of memory on {placement.device} with a micro-batch of {len(batch)} rows of up to "
        f"{width} tokens, at a peak of {peak / GB:.2f} GB: try {'; or '.join(knobs)}. "
        "With the same rows a step, --resume goes on from the last checkpoint"
    )
