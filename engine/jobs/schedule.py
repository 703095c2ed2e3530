"""The learning rate of each step. Pure: a function of the step, so that nothing is to be saved."""

from __future__ import annotations

import math

from engine.jobs.settings import TrainingSettings


def warmup_steps(settings: TrainingSettings, total_steps: int) -> int:
    """Steps until the full rate: a share of all steps below 1, else as many as said."""
    if settings.warmup < 1:
        return math.ceil(settings.warmup * total_steps)
    return int(settings.warmup)


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The rate of step `step`, which counts from 0.

    The same numbers as transformers' schedules of these names give: up linearly over the warmup,
    then linear or half a cosine down to 0, or constant.
    """
    warmup = warmup_steps(settings, total_steps)
    if step < warmup:
        return settings.learning_rate * step / max(1, warmup)
    if settings.schedule == "constant":
        return settings.learning_rate
    left = max(0, total_steps - step) / max(1, total_steps - warmup)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return settings.learning_rate * left
