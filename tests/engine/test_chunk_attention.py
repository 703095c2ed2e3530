"""A stretch of a prompt attends in the quick ways as in the plain one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import chunk_attention
from engine.chunk_attention import attend_chunk, plainly
from engine.masks import FULL, Rule


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    chunk_attention._agreeing.clear()
    yield
    chunk_attention._agreeing.clear()


def inputs(
    heads: int, kv_heads: int, count: int, length: int, value_size: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [
        torch.randn(shape, generator=generator)
        for shape in (
            (heads, count, 16),
            (kv_heads, length, 16),
            (kv_heads, length, value_size),
        )
    ]


def mask_of(rule: Rule, count: int, length: int) -> Tensor:
    queries, keys = torch.arange(length - count, length), torch.arange(length)
    seen = rule.visible(queries[:, None], keys[None, :])
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


@pytest.mark.parametrize("rule", [FULL, Rule("sliding", 7), Rule("chunked", 8)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("count", "length"), [(2, 6), (5, 40), (30, 31)])
def test_a_stretch_sees_what_its_mask_says(
    rule: Rule, heads: int, kv_heads: int, count: int, length: int
) -> None:
    given = inputs(heads, kv_heads, count, length, value_size=8 if kv_heads == 1 else 16)
    mask = mask_of(rule, count, length)
    for _ in range(2):  # the first time it is tried
        found = attend_chunk(*given, lambda: mask, 0.3, sees_all=rule == FULL)
        assert torch.allclose(found, plainly(*given, mask, 0.3), atol=1e-5)
    assert list(chunk_attention._agreeing.values()) == [True]


def test_what_is_no_number_proves_nothing() -> None:
    given, mask = inputs(4, 2, 5, 12), mask_of(FULL, 5, 12)
    given[2][:] = float("nan")
    attend_chunk(*given, lambda: mask, 0.3, sees_all=True)
    assert not chunk_attention._agreeing


@pytest.mark.parametrize("rule", [FULL, Rule("sliding", 7)])
@pytest.mark.parametrize("how", ["wrong", "refused"])
def test_a_way_that_is_wrong_or_refused_is_left_out_with_one_line(
    rule: Rule, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(queries: Tensor, *_given: Any) -> Tensor:
        if how == "refused":
            raise RuntimeError("No available kernel. Aborting execution.\nmore")
        return queries

    monkeypatch.setattr(chunk_attention, "by_end" if rule == FULL else "by_folding", other)
    given, mask = inputs(4, 2, 5, 12), mask_of(rule, 5, 12)
    attend = partial(attend_chunk, *given, lambda: mask, 0.3, sees_all=rule == FULL)
    with caplog.at_level(logging.INFO, "comboio.engine"):
        for _ in range(3):
            assert torch.equal(attend(), plainly(*given, mask, 0.3))
    (line,) = [it.getMessage() for it in caplog.records]
    why = "other numbers" if how == "wrong" else "No available kernel. Aborting execution."
    assert line == f"long prompts are attended with masks on this device: {why}"
