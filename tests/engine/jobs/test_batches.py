"""Rows become batches: every row once an epoch, the same for any number of processes, no padding
learnt or attended to."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.jobs.batches import BatchPlan, collate, count_learnt, share_rows
from engine.jobs.schedule import learning_rate
from engine.jobs.settings import TrainingSettings
from engine.jobs.token_rows import TokenRows
from engine.jobs.tokenizing import NOT_LEARNT, Encoded

counts = st.integers(1, 40)
small = st.integers(1, 5)


def rows_of(*lengths):
    ids = itertools.count(1)
    samples = []
    for length in lengths:
        own = [next(ids) for _ in range(length)]
        samples.append(Encoded(own, own))
    return TokenRows.of(samples)


@given(counts, small, small, small, st.integers(0, 3))
def test_an_epoch_takes_every_row_once_on_however_many_processes(
    num_rows, batch_size, accumulation, processes, epoch
):
    settings = TrainingSettings(batch_size=batch_size, accumulation=accumulation)
    plan = BatchPlan.of(settings, num_rows, processes)
    seen = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        shares = [plan.share(step, rank, processes) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) <= accumulation
        batches = [batch for share in shares for batch in share]
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        taken = [index for batch in batches for index in batch if index is not None]
        assert taken == plan.rows_of(step)
        seen += taken
    assert sorted(seen) == list(range(num_rows))


def test_the_order_changes_with_epoch_and_seed_and_with_nothing_else():
    def order(seed, epoch, processes=1, batch_size=5):
        plan = BatchPlan.of(TrainingSettings(seed=seed, batch_size=batch_size), 30, processes)
        first = epoch * plan.steps_per_epoch
        return [row for at in range(plan.steps_per_epoch) for row in plan.rows_of(first + at)]

    assert order(1, 0) == order(1, 0, processes=3, batch_size=2)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@given(st.floats(0.01, 5), counts, small)
def test_epochs_become_steps(epochs, num_rows, batch_size):
    plan = BatchPlan.of(TrainingSettings(epochs=epochs, batch_size=batch_size), num_rows)
    assert plan.total_steps == math.ceil(epochs * math.ceil(num_rows / batch_size))
    limited = BatchPlan.of(TrainingSettings(max_steps=7, batch_size=batch_size), num_rows)
    assert limited.total_steps == 7


def test_fewer_rows_than_processes_leave_some_with_nothing_to_learn():
    assert [share_rows([4, 9], 2, rank, 3) for rank in range(3)] == [[[4]], [[9]], [[None]]]
    rows = rows_of(3, 4)
    batch = collate(rows, [None])
    assert batch["input_ids"].shape == (1, 2)
    assert (batch["labels"] == NOT_LEARNT).all()
    assert count_learnt(rows, [[None], [0, 1]]) == (5, 7, 2)


def test_padding_is_neither_attended_to_nor_learnt():
    batch = collate(rows_of(2, 4), [0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, -100, -100], [-100, 4, 5, 6]]


def test_a_batch_without_padding_needs_no_mask():
    assert set(collate(rows_of(3, 3), [0, 1])) == {"input_ids", "labels"}


def test_packed_samples_count_their_positions_from_zero_and_do_not_teach_each_other():
    rows = rows_of(3, 2, 4).packed(5)
    assert len(rows) == 2 and rows.num_tokens == 9
    batch = collate(rows, [0, 1])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5], [-100, 7, 8, 9, -100]]
    assert "attention_mask" not in batch


@given(st.lists(st.integers(2, 9), min_size=1, max_size=20))
def test_packing_keeps_what_is_learnt(lengths):
    rows = rows_of(*lengths)
    packed = rows.packed(9)
    assert packed.num_learnt == rows.num_learnt == sum(lengths) - len(lengths)
    learnt, tokens, count = count_learnt(packed, [range(len(packed))])
    assert (learnt, tokens, count) == (rows.num_learnt, sum(lengths), len(packed))
    assert packed.lengths.max() <= 9 and packed.lengths.sum() == sum(lengths)
    assert packed.digest != rows.digest == rows_of(*lengths).digest


def test_rows_take_eight_bytes_a_token():
    rows = rows_of(*[100] * 50)
    held = sum(it.nbytes for it in vars(rows).values() if isinstance(it, np.ndarray))
    assert held < 8.2 * 5000


def test_learning_rates_are_those_of_transformers():
    from transformers import get_scheduler

    for name in ("linear", "cosine", "constant"):
        settings = TrainingSettings(schedule=name, learning_rate=0.1, warmup=3)
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        library = name if name != "constant" else "constant_with_warmup"
        schedule = get_scheduler(library, optimizer, num_warmup_steps=3, num_training_steps=12)
        for step in range(12):
            expected = schedule.get_last_lr()[0]
            assert math.isclose(learning_rate(settings, step, 12), expected, abs_tol=1e-12)
            optimizer.step()
            schedule.step()
