"""Where a run is between its steps: count them, tell of them, validate, keep checkpoints.

The same for the loop here and for trl's trainer, so that both leave the same events and the same
checkpoints. Moves no weight: whoever does calls this before, after and at the end. All processes
of a run call the same methods in the same order.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.jobs import usage
from engine.jobs.base_model import Placement
from engine.jobs.batches import BatchPlan, MicroBatch, count_learnt, share_rows
from engine.jobs.checkpoints import RunState, load_checkpoint, save_checkpoint
from engine.jobs.events import EpochEnded, Finished, Listener, Saved, Started, Stepped, Validated
from engine.jobs.lora_config import count_weights, trainable_parameters
from engine.jobs.ranks import Ranks
from engine.jobs.schedule import learning_rate
from engine.jobs.settings import TrainingSettings
from engine.jobs.stopping import Stopped, StopRequest
from engine.jobs.token_rows import TokenRows
from proto.errors import Error

# The summed loss of rows that are only looked at, in nats.
LossSum = Callable[[TokenRows, MicroBatch], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """What is trained, on what, and who is told."""

    model: Any  # weights that learn have requires_grad
    placement: Placement
    settings: TrainingSettings
    train: TokenRows
    validation: TokenRows | None
    checkpoints: Path
    listener: Listener
    stop: StopRequest
    ranks: Ranks

    @property
    def plan(self) -> BatchPlan:
        """Which rows each step learns from."""
        return BatchPlan.of(self.settings, len(self.train), self.ranks.num_processes)


class StepBook:
    """One run's steps, from where it is."""

    def __init__(
        self, trainee: Trainee, optimizer: torch.optim.Optimizer, loss_sum: LossSum, arithmetic: str
    ) -> None:
        """Nothing is done yet; `resume` may follow, then `begin`.

        Args:
            arithmetic: the options of a more exact one, for a loss that is no number; may be empty.
        """
        self.plan = trainee.plan
        self.scaler: Any = None  # of float16: set where there is one, before `resume`
        self._trainee, self._settings, self._ranks = trainee, trainee.settings, trainee.ranks
        self._tell = trainee.listener
        self._optimizer, self._loss_sum, self._arithmetic = optimizer, loss_sum, arithmetic
        self._parameters = trainable_parameters(trainee.model)
        self._state = RunState()
        self._saved_step: int | None = None
        self._last_path: Path | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""
        return self._state.step >= self.plan.total_steps

    @property
    def rate(self) -> float:
        """The next step's learning rate: it follows from the step alone."""
        return learning_rate(self._settings, self._state.step, self.plan.total_steps)

    @property
    def share(self) -> list[MicroBatch]:
        """This process's part of the next step."""
        return self.plan.share(self.step, self._ranks.rank, self._ranks.num_processes)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint: weights, moments, counts.

        Raises:
            Error: it is damaged, or of another model.
        """
        self._state = load_checkpoint(path, self._parameters, self._optimizer)
        self._saved_step, self._last_path = self._state.step, path

    def restore_scale(self) -> None:
        """The loss scale of float16, once there is a scaler."""
        scale = self._state.loss_scale
        if self.scaler is None or not self.scaler.is_enabled() or scale is None:
            return
        said = {"scale": scale, "_growth_tracker": self._state.scale_growth or 0}
        self.scaler.load_state_dict({**self.scaler.state_dict(), **said})

    # --- telling ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Say that training begins, or goes on."""
        trainable, weights = count_weights(self._trainee.model)
        placement, processes = self._trainee.placement, self._ranks.num_processes
        self._tell(
            Started(
                step=self._state.step,
                total_steps=self.plan.total_steps,
                steps_per_epoch=self.plan.steps_per_epoch,
                rows=len(self._trainee.train),
                step_rows=self.plan.step_rows,
                processes=processes,
                trainable=trainable,
                weights=weights,
                device=str(placement.device) if processes == 1 else placement.device.type,
                dtype=placement.dtype_name,
                is_resumed=self._last_path is not None,
            )
        )

    def stepped(
        self, *, loss: float, norm: float | None, tokens: int, samples: int, seconds: float
    ) -> None:
        """The weights moved once more.

        Args:
            loss, tokens, samples: of all processes together.
        Raises:
            Error: the loss is no number any more.
        """
        rate = self.rate
        if not math.isfinite(loss):
            raise self._diverged(loss, rate)
        step = self._state.step + 1
        self._state = replace(
            self._state,
            step=step,
            seconds=self._state.seconds + seconds,
            epoch_seconds=self._state.epoch_seconds + seconds,
        )
        self._tell(
            Stepped(
                step=step,
                epoch=step / self.plan.steps_per_epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=tokens,
                samples=samples,
                seconds=seconds,
                tokens_per_s=tokens / max(seconds, 1e-9),
                samples_per_s=samples / max(seconds, 1e-9),
                memory=usage.memory(self._trainee.placement.device),
            )
        )

    def finish(self) -> None:
        """Say that the last step is done."""
        memory = usage.memory(self._trainee.placement.device)
        self._tell(Finished(step=self._state.step, seconds=self._state.seconds, memory=memory))

    def stopped(self) -> Stopped:
        """What to raise where it was asked to end, after `save`."""
        return Stopped(
            f"stopped after step {self._state.step} of {self.plan.total_steps}: "
            f"{self._what_is_kept()}",
            # Another process may have heard it.
            self._trainee.stop.signal_number or signal.SIGTERM,
        )

    # --- what is due --------------------------------------------------------------------------

    def look_before(self) -> None:
        """Look at the validation data before the first step."""
        if self._settings.eval_at_start and self._state.step == 0:
            self._validate_once()

    def do_what_is_due(self, *, is_leaving: bool = False) -> None:
        """After a step.

        Args:
            is_leaving: somebody asked for the end: no time for the validation data.
        """
        step = self._state.step
        ends_epoch = self.plan.ends_epoch(step - 1)
        if ends_epoch:
            epoch = self.plan.epoch_of(step - 1) + 1
            self._tell(EpochEnded(step=step, epoch=epoch, seconds=self._state.epoch_seconds))
            self._state = replace(self._state, epoch_seconds=0.0)
        every = self._settings.eval_steps
        if not is_leaving and (
            self.is_over or (ends_epoch if every is None else step % every == 0)
        ):
            self._validate_once()
        if self.is_over or is_leaving or step % self._settings.save_steps == 0:
            self.save()

    def save(self) -> None:
        """Keep a checkpoint of this step, unless there is one.

        Raises:
            Error: the disk is full; says which checkpoint is whole.
        """
        if self._saved_step == self._state.step:
            return
        started_s = time.monotonic()
        if self.scaler is not None and self.scaler.is_enabled():
            said = self.scaler.state_dict()
            self._state = replace(
                self._state, loss_scale=said["scale"], scale_growth=said["_growth_tracker"]
            )
        folder = self._trainee.checkpoints
        if self._ranks.rank == 0:
            keep = self._settings.keep_checkpoints
            try:
                save_checkpoint(folder, self._state, self._parameters, self._optimizer, keep=keep)
            except Error as exc:
                raise Error(f"{exc}; {self._what_is_kept()}") from exc
        self._ranks.barrier()
        self._saved_step = self._state.step
        self._last_path = folder / f"step-{self._state.step:08d}"
        seconds = time.monotonic() - started_s
        self._tell(Saved(step=self._state.step, path=str(self._last_path), seconds=seconds))

    def _validate_once(self) -> None:
        """Look at the validation data, if there is any and it was not done after this step."""
        rows = self._trainee.validation
        if rows is None or self._state.validated_step == self._state.step:
            return
        started_s = time.monotonic()
        loss, learnt = self._mean_loss(rows)
        self._state = replace(self._state, validated_step=self._state.step)
        self._tell(
            Validated(
                step=self._state.step,
                loss=loss,
                perplexity=math.exp(min(loss, 700.0)),
                tokens=learnt,
                seconds=time.monotonic() - started_s,
            )
        )

    def _mean_loss(self, rows: TokenRows) -> tuple[float, int]:
        size = self._settings.eval_batch_size or self._settings.batch_size
        batches = share_rows(range(len(rows)), size, self._ranks.rank, self._ranks.num_processes)
        model = self._trainee.model
        model.eval()
        own = sum(self._loss_sum(rows, batch) for batch in batches)
        model.train()
        learnt, _, _ = count_learnt(rows, batches)
        total, count = self._ranks.sum([own, learnt])
        return total / max(count, 1), int(count)

    # --- words --------------------------------------------------------------------------------

    def _what_is_kept(self) -> str:
        if self._last_path is None:
            return "there is no checkpoint yet"
        return f"{self._last_path} is whole, go on from it with --resume"

    def _diverged(self, loss: float, rate: float) -> Error:
        knobs = [f"a lower --learning-rate (it was {rate:.3g})"]
        if self._settings.max_grad_norm == 0:
            knobs.append("--max-grad-norm 1")
        if self._arithmetic:
            knobs.append(self._arithmetic)
        return Error(
            f"the loss became {loss} at step {self._state.step + 1}: begin anew with "
            f"{', or '.join(knobs)}; {self._what_is_kept()}"
        )
