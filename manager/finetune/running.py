"""Run a fine-tuning job's function for a command line: signals heard, progress shown, result said.

The same for every launch way that trains in this process. Knows no method.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from engine.jobs.settings import JobSettings
from manager.cli import Interrupted
from manager.finetune.progress import Shown

if TYPE_CHECKING:
    from engine.jobs.job import Result, Watcher
    from engine.jobs.stopping import StopRequest

Job = Callable[[JobSettings, "Watcher", "StopRequest"], "Result"]
Follow = Callable[["Watcher", "StopRequest"], "dict[str, Any] | None"]


def run_job(job: Job, settings: JobSettings, *, as_json: bool) -> None:
    """Run it in this process to its end and print where the results are.

    Raises:
        Interrupted, Error: as `follow_run`.
    """
    follow_run(settings, lambda shown, stop: job(settings, shown, stop).to_json(), as_json=as_json)


def follow_run(settings: JobSettings, follow: Follow, *, as_json: bool) -> None:
    """Follow a run, wherever it computes, to its end and print where the results are.

    Args:
        follow: returns the result as plain values; None where another machine has it.
    Raises:
        Interrupted: a signal ended it; says what is kept.
        Error: as the job does.
    """
    from engine.jobs.stopping import Stopped, stop_request

    training = settings.training
    with (
        stop_request() as stop,
        Shown(training.log_steps, training.memory_steps or training.log_steps) as shown,
    ):
        try:
            said = follow(shown, stop)
        except Stopped as exc:
            interrupted = Interrupted(128 + exc.signal_number)
            interrupted.args = (str(exc),)
            raise interrupted from exc
    if said is not None:
        click.echo(json.dumps(said, indent=2) if as_json else "\n".join(_paths(said)))


def _paths(said: dict[str, Any]) -> list[str]:
    return [
        f"{name} {said[name]}" for name in ("lora_adapters", "merged_model", "report") if said[name]
    ]
