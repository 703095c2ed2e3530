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
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from engine.jobs import usage
from engine.jobs.base_model import Placement
from engine.jobs.batches import BatchPlan, MicroBatch, collate, count_learnt, share_rows
from engine.jobs.checkpoints import RunState, load_checkpoint, save_checkpoint
from engine.jobs.events import EpochEnded, Finished, Listener, Saved, Started, Stepped, Validated
from engine.jobs.lora_config import count_weights, trainable_parameters
from engine.jobs.ranks import Ranks
from engine.jobs.schedule import learning_rate
from engine.jobs.settings import TrainingSettings
from engine.jobs.stopping import Stopped, StopRequest
from engine.jobs.token_rows import TokenRows
from engine.jobs.tokenizing import NOT_LEARNT
from proto.errors import Error

GB: Final = 10**9
# transformers' defaults for AdamW, which are torch's.
BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8


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


class _StopNow(Exception):
    """Within a step or a validation: leave it, it will be done again."""


class TrainingLoop:
    """One run, from where it is to its last step."""

    def __init__(self, trainee: Trainee) -> None:
        """Nothing moves yet; `resume` may follow, then `run`."""
        self._model, self._settings = trainee.model, trainee.settings
        self._placement, self._ranks = trainee.placement, trainee.ranks
        self._train, self._validation = trainee.train, trainee.validation
        self._tell, self._stop = trainee.listener, trainee.stop
        self._folder = trainee.checkpoints
        self._plan = BatchPlan.of(self._settings, len(self._train), self._ranks.num_processes)
        self._parameters = trainable_parameters(self._model)
        self._optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self._parameters],
            lr=self._settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=self._settings.weight_decay,
        )
        self._scaler: Any = torch.amp.GradScaler(
            self._placement.device.type,
            enabled=self._placement.device.type == "cuda"
            and self._placement.dtype is torch.float16,
        )
        self._state = RunState()
        self._saved_step: int | None = None
        self._last_path: Path | None = None

    @property
    def total_steps(self) -> int:
        """Of the whole run."""
        return self._plan.total_steps

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            Error: it is damaged, or of another model.
        """
        self._state = load_checkpoint(path, self._parameters, self._optimizer)
        if self._scaler.is_enabled() and self._state.loss_scale is not None:
            self._scaler.load_state_dict(
                {
                    **self._scaler.state_dict(),
                    "scale": self._state.loss_scale,
                    "_growth_tracker": self._state.scale_growth or 0,
                }
            )
        self._saved_step, self._last_path = self._state.step, path

    def run(self) -> None:
        """All steps that are left, with validation and checkpoints between them.

        Raises:
            Stopped: it was asked to end; a checkpoint holds what is done.
            Error: memory ran out, the loss is no number any more, or the disk is full. The last
                checkpoint is whole.
        """
        self._tell_start()
        try:
            if self._settings.eval_at_start and self._state.step == 0:
                self._validate_once()
            while self._state.step < self._plan.total_steps:
                self._advance()
        except _StopNow:
            self._leave()
        finally:
            self._model.eval()
        self._tell(
            Finished(
                step=self._state.step,
                seconds=self._state.seconds,
                memory=usage.memory(self._placement.device),
            )
        )

    def _advance(self) -> None:
        """One step and what is due after it."""
        self._learn()
        step = self._state.step
        is_last = step == self._plan.total_steps
        ends_epoch = self._plan.ends_epoch(step - 1)
        if ends_epoch:
            epoch = self._plan.epoch_of(step - 1) + 1
            self._tell(EpochEnded(step=step, epoch=epoch, seconds=self._state.epoch_seconds))
            self._state = replace(self._state, epoch_seconds=0.0)
        every = self._settings.eval_steps
        if is_last or (ends_epoch if every is None else step % every == 0):
            self._validate_once()
        if is_last or step % self._settings.save_steps == 0:
            self._save()

    # --- one step -----------------------------------------------------------------------------

    def _learn(self) -> None:
        """Move the weights once."""
        started_s = time.monotonic()
        step, settings = self._state.step, self._settings
        rate = learning_rate(settings, step, self._plan.total_steps)
        batches = self._plan.share(step, self._ranks.rank, self._ranks.num_processes)
        counts = [*count_learnt(self._train, batches), int(self._stop.is_made)]
        learnt, tokens, samples, stops = self._ranks.sum(counts)
        if stops:
            raise _StopNow
        loss, norm = self._descend(batches, learnt, rate)
        if not math.isfinite(loss):
            raise self._diverged(loss, rate)
        seconds = time.monotonic() - started_s
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
                memory=usage.memory(self._placement.device),
            )
        )

    def _descend(
        self, batches: Sequence[MicroBatch], learnt: float, rate: float
    ) -> tuple[float, float | None]:
        """Forward, backward, update; (loss of the step, norm of its gradient)."""
        parameters = [parameter for _, parameter in self._parameters]
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
        self._ranks.sum_gradients(parameters)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = None
        if self._settings.max_grad_norm > 0:
            self._scaler.unscale_(self._optimizer)
            norm = float(self._ranks.clip_gradients(parameters, self._settings.max_grad_norm))
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

    def _seed(self, micro_batch: int) -> None:
        """Random numbers (dropout) follow from the seed, the step, the part and the process."""
        parts = (self._settings.seed, self._state.step, micro_batch, self._ranks.rank)
        torch.manual_seed(mixed(*parts))

    # --- between steps ------------------------------------------------------------------------

    def _validate_once(self) -> None:
        """Look at the validation data, if there is any and it was not done after this step."""
        if self._validation is None or self._state.validated_step == self._state.step:
            return
        started_s = time.monotonic()
        loss, learnt = self._mean_loss(self._validation)
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
        ranks = self._ranks
        batches = share_rows(range(len(rows)), size, ranks.rank, ranks.num_processes)
        total = 0.0
        self._model.eval()
        with torch.no_grad():
            for batch in batches:
                self._leave_if_asked()
                with memory_in_words(self._settings, rows, batch, self._placement):
                    total += float(self._loss_sum(rows, batch))
        learnt, _, _ = count_learnt(rows, batches)
        total, count = ranks.sum([total, learnt])
        return total / max(count, 1), int(count)

    def _save(self) -> None:
        if self._saved_step == self._state.step:
            return
        started_s = time.monotonic()
        if self._scaler.is_enabled():
            said = self._scaler.state_dict()
            self._state = replace(
                self._state, loss_scale=said["scale"], scale_growth=said["_growth_tracker"]
            )
        path = self._folder / f"step-{self._state.step:08d}"
        if self._ranks.rank == 0:
            keep = self._settings.keep_checkpoints
            try:
                save_checkpoint(
                    self._folder, self._state, self._parameters, self._optimizer, keep=keep
                )
            except Error as exc:
                raise Error(f"{exc}; {self._what_is_kept()}") from exc
        self._ranks.barrier()
        self._saved_step, self._last_path = self._state.step, path
        seconds = time.monotonic() - started_s
        self._tell(Saved(step=self._state.step, path=str(path), seconds=seconds))

    def _leave_if_asked(self) -> None:
        """Alone, within a step as well; together, where all agree: at the start of each step."""
        if self._stop.is_made and self._ranks.num_processes == 1:
            raise _StopNow

    def _leave(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._save()
        raise Stopped(
            f"stopped after step {self._state.step} of {self._plan.total_steps}: "
            f"{self._what_is_kept()}",
            self._stop.signal_number or signal.SIGTERM,  # another process heard it
        )

    def _what_is_kept(self) -> str:
        if self._last_path is None:
            return "there is no checkpoint yet"
        return f"{self._last_path} is whole, go on from it with --resume"

    def _diverged(self, loss: float, rate: float) -> Error:
        knobs = [f"a lower --learning-rate (it was {rate:.3g})"]
        if self._settings.max_grad_norm == 0:
            knobs.append("--max-grad-norm 1")
        if self._placement.dtype is torch.float16:
            knobs.append("--dtype float32 or bfloat16 (it was float16)")
        return Error(
            f"the loss became {loss} at step {self._state.step + 1}: begin anew with "
            f"{', or '.join(knobs)}; {self._what_is_kept()}"
        )

    def _tell_start(self) -> None:
        trainable, weights = count_weights(self._model)
        self._tell(
            Started(
                step=self._state.step,
                total_steps=self._plan.total_steps,
                steps_per_epoch=self._plan.steps_per_epoch,
                rows=len(self._train),
                step_rows=self._plan.step_rows,
                processes=self._ranks.num_processes,
                trainable=trainable,
                weights=weights,
                device=str(self._placement.device),
                dtype=self._placement.dtype_name,
                is_resumed=self._last_path is not None,
            )
        )


def train(trainee: Trainee, resume_from: Path | None = None) -> None:
    """Run a loop to its end; see `TrainingLoop.run`."""
    loop = TrainingLoop(trainee)
    if resume_from is not None:
        loop.resume(resume_from)
    loop.run()


def mixed(*parts: int) -> int:
    """One seed out of several numbers, 63 bits of it (the finalizer of splitmix64)."""
    value = 0
    for part in parts:
        value = (value ^ part) * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value = (value ^ (value >> 31)) + 0x9E3779B97F4A7C15
    return value % 2**63


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
