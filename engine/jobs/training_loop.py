"""The loop that moves the weights: one process, or several that add up their gradients.

Everything that a step depends on follows from the weights, the optimizer's moments, the seed and
the step's number: which rows, which learning rate, which random numbers. So a run that goes on from
a checkpoint computes what it would have computed undisturbed. The loss of a step is the mean over
its learnt tokens, of all micro-batches and processes together, so that it does not depend on how
the rows are divided.

Knows no adapter and no file format: it is given a model with some weights that learn, rows, and
somebody who listens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.jobs.batches import MicroBatch, collate, count_learnt
from engine.jobs.lora_config import trainable_parameters
from engine.jobs.memory_words import memory_in_words
from engine.jobs.optimizer import new_optimizer
from engine.jobs.seeds import mixed
from engine.jobs.step_book import StepBook, Trainee
from engine.jobs.token_rows import TokenRows
from engine.jobs.tokenizing import NOT_LEARNT


class _StopNow(Exception):
    """Within a step or a validation: leave it, it will be done again."""


class TrainingLoop:
    """One run, from where it is to its last step."""

    def __init__(self, trainee: Trainee) -> None:
        """Nothing moves yet; `resume` may follow, then `run`."""
        self._model, self._settings = trainee.model, trainee.settings
        self._placement, self._ranks = trainee.placement, trainee.ranks
        self._train, self._stop = trainee.train, trainee.stop
        self._parameters = [it for _, it in trainable_parameters(self._model)]
        self._optimizer = new_optimizer(self._settings, self._parameters)
        is_half = self._placement.dtype is torch.float16
        self._scaler: Any = torch.amp.GradScaler(
            self._placement.device.type,
            enabled=self._placement.device.type == "cuda" and is_half,
        )
        self._book = StepBook(
            trainee,
            self._optimizer,
            self._look,
            "--dtype float32 or bfloat16 (it was float16)" if is_half else "",
        )
        self._book.scaler = self._scaler

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            Error: it is damaged, or of another model.
        """
        self._book.resume(path)
        self._book.restore_scale()

    def run(self) -> None:
        """All steps that are left, with validation and checkpoints between them.

        Raises:
            Stopped: it was asked to end; a checkpoint holds what is done.
            Error: memory ran out, the loss is no number any more, or the disk is full. The last
                checkpoint is whole.
        """
        book = self._book
        book.begin()
        try:
            book.look_before()
            while not book.is_over:
                self._learn()
                book.do_what_is_due()
        except _StopNow:
            self._optimizer.zero_grad(set_to_none=True)
            book.save()
            raise book.stopped() from None
        finally:
            self._model.eval()
        book.finish()

    # --- one step -----------------------------------------------------------------------------

    def _learn(self) -> None:
        """Move the weights once."""
        started_s = time.monotonic()
        batches = self._book.share
        counts = [*count_learnt(self._train, batches), int(self._stop.is_made)]
        learnt, tokens, samples, stops = self._ranks.sum(counts)
        if stops:
            raise _StopNow
        loss, norm = self._descend(batches, learnt, self._book.rate)
        self._book.stepped(
            loss=loss,
            norm=norm,
            tokens=int(tokens),
            samples=int(samples),
            seconds=time.monotonic() - started_s,
        )

    def _descend(
        self, batches: Sequence[MicroBatch], learnt: float, rate: float
    ) -> tuple[float, float | None]:
        """Forward, backward, update; (loss of the step, norm of its gradient)."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for index, batch in enumerate(batches):
            self._leave_if_asked()
            self._seed(index)
            with memory_in_words(self._settings, self._train, batch, self._placement):
                loss = self._loss_sum(self._train, batch) / max(learnt, 1)
                self._scaler.scale(loss).backward()
            total += float(loss.detach())
        self._leave_if_asked()
        self._ranks.sum_gradients(self._parameters)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._settings.max_grad_norm > 0:
            self._scaler.unscale_(self._optimizer)
            norm = float(self._ranks.clip_gradients(self._parameters, self._settings.max_grad_norm))
        if math.isfinite(total):
            self._scaler.step(self._optimizer)
            self._scaler.update()
        (total,) = self._ranks.sum([total])
        return total, norm

    def _loss_sum(self, rows: TokenRows, batch: MicroBatch) -> Tensor:
        """Of all learnt tokens of a micro-batch, in nats, in float32."""
        tensors = {
            name: tensor.to(self._placement.device, non_blocking=True)
            for name, tensor in collate(rows, batch).items()
        }
        labels = tensors.pop("labels")[:, 1:]
        with self._placement.autocast():
            logits = self._model(**tensors, use_cache=False).logits[:, :-1]
        is_learnt = labels != NOT_LEARNT
        # Of prompts and padding no logits are widened to float32.
        return functional.cross_entropy(
            logits[is_learnt].float(), labels[is_learnt], reduction="sum"
        )

    def _look(self, rows: TokenRows, batch: MicroBatch) -> float:
        """The same of rows that are only looked at."""
        self._leave_if_asked()
        with torch.no_grad(), memory_in_words(self._settings, rows, batch, self._placement):
            return float(self._loss_sum(rows, batch))

    def _seed(self, micro_batch: int) -> None:
        """Random numbers (dropout) follow from the seed, the step, the part and the process."""
        parts = (self._settings.seed, self._book.step, micro_batch, self._ranks.rank)
        torch.manual_seed(mixed(*parts))

    def _leave_if_asked(self) -> None:
        """Alone, within a step as well; together, where all agree: at the start of each step."""
        if self._stop.is_made and self._ranks.num_processes == 1:
            raise _StopNow


def train(trainee: Trainee, resume_from: Path | None = None) -> None:
    """Run a loop to its end; see `TrainingLoop.run`."""
    loop = TrainingLoop(trainee)
    if resume_from is not None:
        loop.resume(resume_from)
    loop.run()
