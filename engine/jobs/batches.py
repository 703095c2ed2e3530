"""Which rows each step learns from, and the tensors that the model gets of them.

The order follows from the seed and the step alone, so that a run can go on at any step, and from
the whole batch of all processes, so that it does not depend on how many there are. Knows rows and
tensors; no model and no device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from engine.jobs.settings import TrainingSettings
from engine.jobs.token_rows import Ints, TokenRow, TokenRows
from engine.jobs.tokenizing import NOT_LEARNT

MicroBatch = Sequence[int | None]  # rows by index; None: nothing, so that each process has as many

# What padding is filled with. It is neither attended to nor learnt; any id that exists will do.
PAD_ID: Final = 0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How many steps there are, and which rows belong to each."""

    num_rows: int
    step_rows: int  # of all processes together
    total_steps: int
    batch_size: int  # of one micro-batch of one process
    seed: int

    @classmethod
    def of(cls, settings: TrainingSettings, num_rows: int, num_processes: int = 1) -> BatchPlan:
        """The plan for so many rows; the last step of an epoch may have fewer."""
        step_rows = settings.batch_size * settings.accumulation * num_processes
        total = settings.max_steps or math.ceil(settings.epochs * math.ceil(num_rows / step_rows))
        return cls(num_rows, step_rows, total, settings.batch_size, settings.seed)

    @property
    def steps_per_epoch(self) -> int:
        """The last of them may have fewer rows."""
        return math.ceil(self.num_rows / self.step_rows)

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to; both count from 0."""
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether it is the last of its epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def rows_of(self, step: int) -> list[int]:
        """All rows of a step, of all processes, from 0."""
        order = _order(self.num_rows, self.seed, self.epoch_of(step))
        start = step % self.steps_per_epoch * self.step_rows
        rows: list[int] = order[start : start + self.step_rows].tolist()
        return rows

    def share(self, step: int, rank: int = 0, num_processes: int = 1) -> list[MicroBatch]:
        """The micro-batches of one process; every process gets as many of them."""
        return share_rows(self.rows_of(step), self.batch_size, rank, num_processes)


def share_rows(
    rows: Sequence[int], batch_size: int, rank: int = 0, num_processes: int = 1
) -> list[MicroBatch]:
    """Divide rows evenly over processes, and one process's part into micro-batches."""
    parts = np.array_split(np.asarray(rows, dtype=np.int64), num_processes)
    own = parts[rank].tolist()
    num_batches = math.ceil(max(len(part) for part in parts) / batch_size)
    batches = [own[at : at + batch_size] or [None] for at in range(0, len(own), batch_size)]
    return batches + [[None]] * (num_batches - len(batches))


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> Ints:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def collate(rows: TokenRows, batch: MicroBatch) -> dict[str, Any]:
    """One micro-batch as the model's arguments, with `labels` of the same shape.

    Returns:
        input_ids and labels, (rows, longest row) int64, padded on the right. Packed rows come
        with position_ids, from which transformers tells samples apart; others with
        attention_mask, unless nothing is padded.
    """
    return pad([rows[index] for index in batch if index is not None], rows.is_packed)


def pad(rows: Sequence[TokenRow], is_packed: bool) -> dict[str, Any]:
    """See `collate`. Without any row, a row of two tokens that teaches nothing."""
    width = max((len(row.input_ids) for row in rows), default=2)
    shape = (max(len(rows), 1), width)
    input_ids = torch.full(shape, PAD_ID)
    labels = torch.full(shape, NOT_LEARNT)
    # Padding counts its positions from 0, as a sample of its own.
    position_ids = torch.arange(width).repeat(shape[0], 1)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for at, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[at, :length] = torch.from_numpy(row.input_ids)
        labels[at, :length] = torch.from_numpy(row.labels)
        position_ids[at, :length] = torch.from_numpy(row.position_ids)
        position_ids[at, length:] = torch.arange(width - length)
        attention_mask[at, :length] = 1
    batch = {"input_ids": input_ids, "labels": labels}
    if is_packed:
        return {**batch, "position_ids": position_ids}
    if all(len(row.input_ids) == width for row in rows):
        return batch
    return {**batch, "attention_mask": attention_mask}


def count_learnt(rows: TokenRows, batches: Sequence[MicroBatch]) -> tuple[int, int, int]:
    """(tokens with a label, tokens, rows) of some micro-batches, without padding."""
    learnt = tokens = count = 0
    for batch in batches:
        for index in batch:
            if index is not None:
                row = rows[index]
                learnt += int((row.labels[1:] != NOT_LEARNT).sum())
                tokens += len(row.input_ids)
                count += 1
    return learnt, tokens, count
