"""Small fine-tuning jobs for tests: a tiny model with a tokenizer, a little data, one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.jobs.events import Event, Stepped, Validated
from engine.jobs.job import Result
from engine.jobs.settings import (
    DataSettings,
    JobSettings,
    LoraSettings,
    OutputSettings,
    TrainingSettings,
)
from engine.jobs.stopping import StopRequest
from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer

VOCAB = 300
# Dropout of the model's own would draw other numbers in a loop that is written otherwise.
NO_DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
}
EXCHANGES = [
    {"prompt": "The pump ", "completion": "delivers fluid at a set rate."},
    {"prompt": "The monitor shows", "completion": " the heart rate and the blood pressure."},
    {"prompt": "Olá, ", "completion": "naïve fox"},
    {"prompt": "The lazy dog", "completion": " jumps."},
    {"prompt": "the quick brown fox ", "completion": "jumps over a lazy dog"},
    {"prompt": "A valve", "completion": " is cleaned after each patient, and tested once a week."},
    {"prompt": "The nurse", "completion": " checks the alarm."},
]


def save_model(folder: Path, kind: str = "llama", *, chat: bool = False, **overrides: Any) -> Path:
    """A tiny checkpoint with a tokenizer."""
    changes = {**NO_DROPOUT.get(kind, {}), **overrides}
    save_tiny(kind, folder, vocab_size=VOCAB, eos_token_id=0, **changes)
    save_tokenizer(folder, VOCAB, chat=chat)
    return folder


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """An object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def job_settings(
    model: Path,
    data: Path,
    save_dir: Path,
    *,
    validation: Path | None = None,
    data_changes: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **training: Any,
) -> JobSettings:
    """A short run on the CPU."""
    defaults = {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 6, "device": "cpu"}
    return JobSettings(
        method="lora",
        base_model=str(model),
        data=DataSettings(
            train=(str(data),),
            validation=() if validation is None else (str(validation),),
            **(data_changes or {}),
        ),
        lora=LoraSettings(**{"r": 4, "alpha": 8, **(lora or {})}),
        training=TrainingSettings(**{**defaults, **training}),
        output=OutputSettings(save_dir=str(save_dir), **{"tensorboard": False, **(output or {})}),
    )


def resumed(settings: JobSettings, **training: Any) -> JobSettings:
    """The same job, going on with what is in its folder."""
    return replace(
        settings,
        output=replace(settings.output, resume=True),
        training=replace(settings.training, **training),
    )


class Watching:
    """Hears everything; may do something at an event."""

    def __init__(self, at: Callable[[Event], None] = lambda _: None) -> None:
        self.events: list[Event] = []
        self.lines: list[str] = []
        self._at = at

    def busy(self, text: str) -> None:
        """Kept with the lines."""
        self.lines.append(text)

    def say(self, line: str) -> None:
        """Kept."""
        self.lines.append(line)

    def event(self, event: Event) -> None:
        """Kept, then acted upon."""
        self.events.append(event)
        self._at(event)


def run(
    settings: JobSettings, watching: Watching | None = None, stop: StopRequest | None = None
) -> Result:
    """The job, in this process."""
    from engine.jobs.lora import run_lora

    return run_lora(settings, watching or Watching(), stop or StopRequest())


def metrics_of(save_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(save_dir: Path) -> list[float]:
    """Of each step, in order."""
    return [it["loss"] for it in metrics_of(save_dir) if it["event"] == Stepped.kind]


def validation_losses_of(save_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of each look at the validation data."""
    return [
        (it["step"], it["loss"]) for it in metrics_of(save_dir) if it["event"] == Validated.kind
    ]
