"""Follow trl's trainer: hand its steps to the run's book, stop when asked.

A callback that does between steps what `engine.jobs.training_loop` does. All processes come here
after every step and do the same.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from engine.jobs.batches import MicroBatch, count_learnt
from engine.jobs.step_book import StepBook, Trainee
from engine.jobs.token_rows import TokenRows


class Steps(TrainerCallback):
    """One run's steps, from where it is."""

    def __init__(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
        self.trainer: Any = None  # set as soon as there is one
        self.was_stopped = False
        self.book = StepBook(
            trainee, optimizer, self._look, "--dtype float32 and --mixed-precision no"
        )
        self._trainee, self._optimizer = trainee, optimizer
        self._since_s = time.monotonic()

    def finish(self) -> None:
        """Say that it is over.

        Raises:
            Stopped: it was asked to end early.
        """
        if self.was_stopped:
            raise self.book.stopped()
        self.book.finish()

    # --- what the trainer calls ---------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the validation data before the first step."""
        self.book.look_before()
        self._since_s = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rate follows from the step alone, whatever happened before."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.book.rate

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done, with its loss over all processes; do what is due after it."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return  # the trainer's own summary, at its end
        state.log_history.clear()  # metrics.jsonl has it
        clips = self._trainee.settings.max_grad_norm > 0
        norm = float(logs["grad_norm"]) if clips else None
        is_leaving = self._stepped(float(logs["loss"]), norm)
        self.book.do_what_is_due(is_leaving=is_leaving)
        if is_leaving and not self.book.is_over:
            self.was_stopped = True
            control.should_training_stop = True
        self._since_s = time.monotonic()

    # --- the parts ----------------------------------------------------------------------------

    def _stepped(self, loss: float, norm: float | None) -> bool:
        """Write a step down; whether somebody asked for the end."""
        trainee = self._trainee
        _, *counts = count_learnt(trainee.train, self.book.share)
        tokens, samples, stops = trainee.ranks.sum([*counts, int(trainee.stop.is_made)])
        self.book.stepped(
            loss=loss,
            norm=norm,
            tokens=int(tokens),
            samples=int(samples),
            seconds=time.monotonic() - self._since_s,
        )
        return stops > 0

    def _look(self, rows: TokenRows, batch: MicroBatch) -> float:
        """The trainer's own loss of rows that are only looked at."""
        found: float = self.trainer.loss_sum(rows, batch)
        return found
