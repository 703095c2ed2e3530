"""Options are checked when they are made; tables and sizes read well."""

from __future__ import annotations

import math

import pytest

from manager.generation import GenerationOptions
from manager.tables import milliseconds, size, table
from proto.errors import RequestRefused


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"logprobs": 101},
        {"stop": "text"},
        {"stop": ("",)},
        {"stop": (1,)},
    ],
)
def test_a_value_that_the_wire_would_not_carry_is_refused_with_its_name(wrong):
    (name,) = wrong
    with pytest.raises(RequestRefused, match=name):
        GenerationOptions(**wrong)


def test_options_become_the_wires_words():
    options = GenerationOptions(temperature=1, top_k=5, top_p=0.5, logprobs=2)
    sampling = options.sampling(seed=9, draw=3, num_history=0)
    assert (sampling.seed, sampling.draw, sampling.temperature) == (9, 3, 1.0)
    assert (sampling.top_k, sampling.top_p, sampling.logprobs) == (5, 0.5, 2)


def test_a_table_is_as_wide_as_what_it_says():
    lines = table(("NAME", "COUNT"), [("a", "5"), ("longer", "1000")]).splitlines()
    assert lines == ["NAME    COUNT", "a           5", "longer   1000"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (5e12, "5.0 TB")],
)
def test_sizes_are_for_people(num_bytes, text):
    assert size(num_bytes) == text


def test_milliseconds_of_nothing_are_a_dash():
    assert (milliseconds(None), milliseconds(0.00123)) == ("-", "1.23")
