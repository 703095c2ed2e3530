"""What happens in a run, as records: the one thing that logs, metrics and progress bars hear of.

Whoever trains (the loop here, trl's Trainer through its callbacks) makes these; what is done with
them stands in `engine.jobs.run_log` and in the command line. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Anything that is told; `kind` is its name in metrics.jsonl."""

    kind: ClassVar[str] = ""

    step: int  # steps done so far

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """Training begins, or goes on."""

    kind: ClassVar[str] = "start"

    total_steps: int
    steps_per_epoch: int
    rows: int
    step_rows: int
    processes: int
    trainable: int  # weights
    weights: int  # of the model, with the adapter's
    device: str
    dtype: str
    is_resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the process takes, in bytes; GPU figures are None without one."""

    rss_bytes: int
    peak_rss_bytes: int
    gpu_bytes: int | None = None  # allocated by torch
    peak_gpu_bytes: int | None = None
    gpu_reserved_bytes: int | None = None
    gpu_busy: float | None = None  # 0 to 1; None where the driver does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Event):
    """The weights moved once."""

    kind: ClassVar[str] = "train"

    epoch: float  # epochs done
    loss: float  # mean of the step's learnt tokens, of all processes
    learning_rate: float
    grad_norm: float | None  # before it was clipped
    tokens: int  # of the step, without padding
    samples: int
    seconds: float
    tokens_per_s: float
    samples_per_s: float
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Event):
    """The validation data was looked at."""

    kind: ClassVar[str] = "validation"

    loss: float  # mean of all learnt tokens
    perplexity: float
    tokens: int  # learnt ones
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochEnded(Event):
    """All training rows were learnt from once more."""

    kind: ClassVar[str] = "epoch"

    epoch: int  # from 1
    seconds: float  # without validation and checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A checkpoint is on disk, whole."""

    kind: ClassVar[str] = "checkpoint"

    path: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The last step is done."""

    kind: ClassVar[str] = "end"

    seconds: float  # of training, in all starts of the run
    memory: Memory


Listener = Callable[[Event], None]
