"""Packing puts every sample into one row that it fits, and few rows do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.jobs.packing import pack


@given(st.integers(1, 50).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=80))
))  # fmt: skip
def test_each_sample_is_in_one_row_and_no_row_is_too_long(drawn):
    capacity, lengths = drawn
    groups = pack(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in group) for group in groups]
    assert all(total <= capacity for total in sums)
    # Of any two rows, the samples would not have fitted into one: more than half is full.
    assert all(a + b > capacity for a, b in zip(sorted(sums), sorted(sums)[1:], strict=False))
    assert groups == sorted(groups) == pack(lengths, capacity)


def test_a_perfect_fit_is_found():
    assert pack([6, 4, 7, 3, 10], 10) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("lengths", [[11], [0]])
def test_a_sample_that_fits_no_row_is_a_mistake_of_the_caller(lengths):
    with pytest.raises(ValueError, match="does not fit 10"):
        pack(lengths, 10)
