"""Follow trl's trainer: tell what happens, validate, write checkpoints, stop when asked.

A callback that does between steps what `engine.jobs.training_loop` does, with the same events and
the same checkpoints. All processes come here after every step and do the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from engine.jobs import usage
from engine.jobs.base_model import Placement
from engine.jobs.batches import BatchPlan, count_learnt, share_rows
from engine.jobs.checkpoints import RunState, save_checkpoint
from engine.jobs.events import EpochEnded, Finished, Listener, Saved, Started, Stepped, Validated
from engine.jobs.lora_config import count_weights, trainable_parameters
from engine.jobs.ranks import Ranks
from engine.jobs.schedule import learning_rate
from engine.jobs.settings import TrainingSettings
from engine.jobs.stopping import Stopped, StopRequest
from engine.jobs.token_rows import TokenRows
from proto.errors import Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run works on and whom it tells."""

    settings: TrainingSettings
    placement: Placement
    plan: BatchPlan
    train: TokenRows
    validation: TokenRows | None
    checkpoints: Path
    listener: Listener
    stop: StopRequest
    ranks: Ranks


class Steps(TrainerCallback):
    """One run's steps, from where it is."""

    def __init__(
        self,
        around: Surroundings,
        model: Any,
        optimizer: torch.optim.Optimizer,
        state: RunState,
        resumed_from: Path | None,
    ) -> None:
        self.trainer: Any = None  # set as soon as there is one
        self.was_stopped = False
        self._around, self._settings, self._plan = around, around.settings, around.plan
        self._ranks, self._tell = around.ranks, around.listener
        self._model, self._optimizer = model, optimizer
        self._parameters = trainable_parameters(model)
        self._state = state
        self._last_path = resumed_from
        self._saved_step = state.step if resumed_from is not None else None
        self._since_s = time.monotonic()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    def begin(self) -> None:
        """Say that training begins, or goes on."""
        trainable, weights = count_weights(self._model)
        self._tell(
            Started(
                step=self._state.step,
                total_steps=self._plan.total_steps,
                steps_per_epoch=self._plan.steps_per_epoch,
                rows=len(self._around.train),
                step_rows=self._plan.step_rows,
                processes=self._ranks.num_processes,
                trainable=trainable,
                weights=weights,
                device=self._around.placement.device.type,
                dtype=self._around.placement.dtype_name,
                is_resumed=self._last_path is not None,
            )
        )

    def finish(self) -> None:
        """Say that it is over.

        Raises:
            Stopped: it was asked to end early.
        """
        if self.was_stopped:
            raise Stopped(
                f"stopped after step {self._state.step} of {self._plan.total_steps}: "
                f"{self._what_is_kept()}",
                self._around.stop.signal_number or 0,
            )
        memory = usage.memory(self._around.placement.device)
        self._tell(Finished(step=self._state.step, seconds=self._state.seconds, memory=memory))

    # --- what the trainer calls ---------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the validation data before the first step."""
        if self._settings.eval_at_start and self._state.step == 0:
            self._validate_once()
        self._since_s = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The rate follows from the step alone, whatever happened before."""
        rate = learning_rate(self._settings, self._state.step, self._plan.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done, with its loss over all processes; do what is due after it."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return  # the trainer's own summary, at its end
        state.log_history.clear()  # metrics.jsonl has it
        norm = float(logs["grad_norm"]) if self._settings.max_grad_norm > 0 else None
        wants_stop = self._stepped(float(logs["loss"]), norm)
        step = self._state.step
        is_last = step == self._plan.total_steps
        ends_epoch = self._plan.ends_epoch(step - 1)
        if ends_epoch:
            epoch = self._plan.epoch_of(step - 1) + 1
            self._tell(EpochEnded(step=step, epoch=epoch, seconds=self._state.epoch_seconds))
            self._state = replace(self._state, epoch_seconds=0.0)
        every = self._settings.eval_steps
        if not wants_stop and (is_last or (ends_epoch if every is None else step % every == 0)):
            self._validate_once()
        if is_last or wants_stop or step % self._settings.save_steps == 0:
            self._save()
        if wants_stop and not is_last:
            self.was_stopped = True
            control.should_training_stop = True
        self._since_s = time.monotonic()

    # --- the parts ----------------------------------------------------------------------------

    def _stepped(self, loss: float, norm: float | None) -> bool:
        """Tell of a step; whether somebody asked for the end."""
        step = self._state.step
        rate = learning_rate(self._settings, step, self._plan.total_steps)
        own = self._plan.share(step, self._ranks.rank, self._ranks.num_processes)
        _, *counts = count_learnt(self._around.train, own)
        tokens, samples, stops = self._ranks.sum([*counts, int(self._around.stop.is_made)])
        if not math.isfinite(loss):
            raise self._diverged(loss, rate)
        seconds = time.monotonic() - self._since_s
        self._state = replace(
            self._state,
            step=step + 1,
            seconds=self._state.seconds + seconds,
            epoch_seconds=self._state.epoch_seconds + seconds,
        )
        self._tell(
            Stepped(
                step=step + 1,
                epoch=(step + 1) / self._plan.steps_per_epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                tokens=int(tokens),
                samples=int(samples),
                seconds=seconds,
                tokens_per_s=tokens / max(seconds, 1e-9),
                samples_per_s=samples / max(seconds, 1e-9),
                memory=usage.memory(self._around.placement.device),
            )
        )
        return stops > 0

    def _validate_once(self) -> None:
        rows = self._around.validation
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
        self._model.eval()
        own = sum(self.trainer.loss_sum(rows, batch) for batch in batches)
        self._model.train()
        learnt, _, _ = count_learnt(rows, batches)
        total, count = self._ranks.sum([own, learnt])
        return total / max(count, 1), int(count)

    def _save(self) -> None:
        if self._saved_step == self._state.step:
            return
        started_s = time.monotonic()
        scaler = self.trainer.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            said = scaler.state_dict()
            self._state = replace(
                self._state, loss_scale=said["scale"], scale_growth=said["_growth_tracker"]
            )
        folder = self._around.checkpoints
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

    def _what_is_kept(self) -> str:
        if self._last_path is None:
            return "there is no checkpoint yet"
        return f"{self._last_path} is whole, go on from it with --resume"

    def _diverged(self, loss: float, rate: float) -> Error:
        return Error(
            f"the loss became {loss} at step {self._state.step + 1}: begin anew with a lower "
            f"--learning-rate (it was {rate:.3g}), or with --dtype float32 and --mixed-precision "
            f"no; {self._what_is_kept()}"
        )
