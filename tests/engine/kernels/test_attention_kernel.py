"""Attention over blocks, by every set of kernels here, against the formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import CallSettings, StageRun, StepContext, attend
from engine.kernels import native
from engine.kernels.attention import MAX_RUN_TOKENS
from engine.kv import BLOCK_TOKENS, BlockCache, SiteShape, token_slots
from engine.kv_quantize import quantized
from engine.masks import FULL, Rule

CPU = torch.device("cpu")
SITE = (0, 0)
# Of the values' size, which is about 1.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
QUANTIZATIONS = ["none", "int8"]
RULES = [FULL, Rule("sliding", 1), Rule("sliding", 7), Rule("sliding", 300), Rule("chunked", 40)]


@pytest.fixture(params=native.available())
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.chosen(request.param):
        yield request.param


class Sequences:
    """Some sequences in one cache: their past is written, their next tokens are to come."""

    def __init__(
        self,
        runs: list[tuple[int, int]],
        heads: tuple[int, int],
        sizes: tuple[int, int],
        dtype: torch.dtype,
        seed: int,
        quantize: str = "none",
    ) -> None:
        """
        Args:
            runs: (tokens of the past, new tokens) of each sequence.
            heads: of queries and of keys; sizes: of keys and of values.
        """
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.sizes, self.dtype = heads, sizes, dtype
        self.quantize = quantize
        blocks = [-(-(past + new) // BLOCK_TOKENS) for past, new in runs]
        shape = SiteShape(heads[1], *sizes)
        self.cache = BlockCache({SITE: shape}, sum(blocks) + 2, dtype, CPU, quantize)
        # What nobody wrote must not be read.
        for tensor in self.cache.scales(SITE) or self.cache.tensors(SITE):
            tensor.fill_(float("nan"))
        places = torch.randperm(sum(blocks) + 2, generator=self.generator)
        self.runs, self.keys, self.values = [], [], []
        for i, (past, new) in enumerate(runs):
            table = places[sum(blocks[:i]) :][: blocks[i]].clone()
            self.runs.append(
                StageRun(start=past, num_tokens=new, rope_length=past + new, blocks=table)
            )
            self.keys.append(self.random(past + new, heads[1], sizes[0]))
            self.values.append(self.random(past + new, heads[1], sizes[1]))
            positions = torch.arange(past)
            slots = table[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
            self.cache.write(SITE, slots, self.keys[-1][:past], self.values[-1][:past])
        self.queries = [self.random(new, heads[0], sizes[0]) for _, new in runs]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def attend(self, rule: Rule, told: CallSettings) -> Tensor:
        """One step, whose queries, keys and values lie side by side in one tensor."""
        step = StepContext(runs=self.runs, cache=self.cache, device=CPU, rules={SITE: rule})
        step.enter_layer(0)
        new = [(it.start, it.stop) for it in self.runs]
        parts = [
            torch.cat(self.queries),
            torch.cat([it[a:b] for it, (a, b) in zip(self.keys, new, strict=True)]),
            torch.cat([it[a:b] for it, (a, b) in zip(self.values, new, strict=True)]),
        ]
        both = torch.cat([it.flatten(1) for it in parts], dim=1)
        cut = both.split([it.shape[1] * it.shape[2] for it in parts], dim=1)
        query, key, value = (a.unflatten(1, b.shape[1:]) for a, b in zip(cut, parts, strict=True))
        return attend(step, query, key, value, told)

    def held(self, rows: Tensor) -> Tensor:
        """What the cache holds of keys or values, float64."""
        if self.quantize == "none":
            return rows.double()
        numbers, scales = quantized(rows)
        return numbers.double() * scales.double().unsqueeze(-1)

    def by_the_formula(self, rule: Rule, told: CallSettings) -> Tensor:
        """(tokens, heads, value_size) float64."""
        results = []
        for run, queries, keys, values in zip(
            self.runs, self.queries, self.keys, self.values, strict=True
        ):
            group = self.heads[0] // self.heads[1]
            keys, values = (self.held(it).repeat_interleave(group, 1) for it in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) * told.scale
            if told.softcap is not None:
                scores = told.softcap * torch.tanh(scores / told.softcap)
            positions = torch.arange(run.stop)
            seen = rule.visible(positions[run.start :, None], positions[None, :])
            scores = scores.masked_fill(~seen, float("-inf"))
            if told.sinks is not None:
                sinks = told.sinks.double().view(-1, 1, 1).expand(-1, run.num_tokens, 1)
                scores = torch.cat([scores, sinks], dim=-1)
            weights = torch.softmax(scores, dim=-1)[..., : run.stop]
            results.append(torch.einsum("hqk,khd->qhd", weights, values))
        return torch.cat(results)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 15, 16, 17, 63, 64, 100, 511, 513, 1100]),
            st.sampled_from([1, 1, 1, 2, 3, 16, 17, 40]),
        ),
        min_size=1,
        max_size=3,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (8, 2), (6, 1), (15, 5), (8, 1)]),
    sizes=st.sampled_from(
        [(64, 64), (32, 32), (80, 80), (6, 2), (40, 24), (96, 64), (192, 128), (1, 1)]
    ),
    dtype=st.sampled_from(list(CLOSE)),
    rule=st.sampled_from(RULES),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
    quantize=st.sampled_from(QUANTIZATIONS),
    seed=st.integers(0, 1000),
)
def test_every_run_gets_what_the_formula_says(
    kernels: str,
    runs: list[tuple[int, int]],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    rule: Rule,
    softcap: float | None,
    with_sinks: bool,
    quantize: str,
    seed: int,
) -> None:
    """Few tokens and many in one step, whatever lies in the past, in blocks anywhere."""
    it = Sequences(runs, heads, sizes, dtype, seed, quantize)
    sinks = torch.randn(heads[0], generator=it.generator).to(dtype) if with_sinks else None
    told = CallSettings(sizes[0] ** -0.5, softcap, sinks)
    result = it.attend(rule, told)
    assert result.dtype == dtype
    assert result.is_contiguous()
    expected = it.by_the_formula(rule, told)
    # Torch rounds the scores of 16 bits too where it makes them one by one.
    slack = 4 if softcap is not None or with_sinks else 2
    assert float((result.double() - expected).abs().max()) <= slack * CLOSE[dtype] * max(
        1.0, float(expected.abs().max())
    )


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_neither_neighbours_nor_threads_change_a_bit(
    kernels: str, quantize: str, dtype: torch.dtype
) -> None:
    told = CallSettings(0.125)
    runs = [(1300, 1), (40, 3), (700, 16), (0, 1)]
    together = Sequences(runs, (8, 2), (64, 64), dtype, 5, quantize)
    before = native.threads()
    try:
        expected = together.attend(FULL, told)
        native.set_threads(3)
        assert torch.equal(together.attend(FULL, told), expected)
    finally:
        native.set_threads(before)
    row = 0
    for number, run in enumerate(together.runs):
        alone = Sequences(runs, (8, 2), (64, 64), dtype, 5, quantize)
        for part in (alone.runs, alone.queries, alone.keys, alone.values):
            part[:] = part[number : number + 1]
        assert torch.equal(alone.attend(FULL, told), expected[row : row + run.num_tokens])
        row += run.num_tokens


def test_a_lone_large_score_takes_all(kernels: str) -> None:
    """Scores far apart neither overflow nor wash out, wherever the largest one stands."""
    for place in (0, 70, 600, 1023):
        it = Sequences([(1023, 1)], (4, 2), (32, 32), torch.float32, 1)
        it.queries[0].fill_(10.0)
        it.keys[0][place] = 30.0
        slot = int(it.runs[0].blocks[place // BLOCK_TOKENS]) * BLOCK_TOKENS + place % BLOCK_TOKENS
        it.cache.tensors(SITE)[0][slot] = 30.0
        result = it.attend(FULL, CallSettings(1.0))
        expected = it.values[0][place].repeat_interleave(2, 0)
        assert torch.allclose(result[0], expected)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_a_number_in_the_past_reaches_the_result(
    kernels: str, number: float, quantize: str, dtype: torch.dtype
) -> None:
    """Whoever judges a step by its result finds it there; another sequence has none of it."""
    it = Sequences([(100, 1), (100, 1)], (4, 2), (32, 32), dtype, 1, quantize)
    slot = int(it.runs[0].blocks[3]) * BLOCK_TOKENS + 2
    rows = torch.full((1, 2, 32), number, dtype=dtype)
    it.cache.write(SITE, torch.tensor([slot]), rows, rows)
    result = it.attend(FULL, CallSettings(1.0))
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_a_query_that_is_no_number_spoils_its_own_head_alone(
    kernels: str, quantize: str, dtype: torch.dtype
) -> None:
    it = Sequences([(100, 2), (100, 1)], (8, 2), (32, 32), dtype, 1, quantize)
    it.queries[0][1, 5, 3] = float("nan")
    result = it.attend(FULL, CallSettings(1.0))
    assert result[1, 5].isnan().all()
    result[1, 5] = 0
    assert result.isfinite().all()


def test_a_site_that_is_told_something_else_does_as_told(kernels: str) -> None:
    it = Sequences([(50, 1)], (4, 2), (32, 32), torch.float32, 1)
    for told in (
        CallSettings(0.1),
        CallSettings(1.0),
        CallSettings(1.0, 3.0),
        CallSettings(1.0, None, torch.ones(4)),
        CallSettings(1.0, None, torch.full((4,), 9.0)),
    ):
        result, expected = it.attend(FULL, told), it.by_the_formula(FULL, told)
        assert torch.allclose(result.double(), expected, atol=1e-5)


def test_rows_of_any_strides_are_read_where_they_are(kernels: str) -> None:
    it = Sequences([(20, MAX_RUN_TOKENS)], (4, 2), (32, 32), torch.float32, 1)
    step = StepContext(runs=it.runs, cache=it.cache, device=CPU, rules={SITE: FULL})
    step.enter_layer(0)
    run = it.runs[0]
    query, key, value = it.queries[0], it.keys[0][run.start :], it.values[0][run.start :]
    by_heads = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in (query, key)]
    by_numbers = value.transpose(0, 2).contiguous().transpose(0, 2)
    result = attend(step, *by_heads, by_numbers, CallSettings(0.5))
    assert torch.allclose(result.double(), it.by_the_formula(FULL, CallSettings(0.5)), atol=1e-5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    heads=st.integers(1, 5),
    sizes=st.tuples(st.integers(1, 70), st.sampled_from([1, 8, 33, 64])),
    dtype=st.sampled_from(list(CLOSE)),
    magnitude=st.sampled_from([0.0, 1e-44, 1e-39, 1e-7, 1.0, 1e4, 1e38]),
    seed=st.integers(0, 1000),
)
def test_8_bits_are_written_as_torch_writes_them(
    kernels: str,
    heads: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    magnitude: float,
    seed: int,
) -> None:
    """To the last bit, whatever the numbers: zeros, the smallest, ties, and none at all."""
    it = Sequences([(9, 40), (0, 3)], (heads, heads), sizes, dtype, seed, "int8")
    for rows in (*it.keys, *it.values):
        rows.mul_(magnitude)
        rows[-1, 0, 0] = float("nan")
        rows[-2, -1, -1] = float("-inf")
        rows[-3] = torch.arange(rows[0].numel()).view(rows[0].shape) / 2  # half of all are ties
        rows[-3, :, 0] = 127
    it.attend(FULL, CallSettings(1.0))
    for run, *given_rows in zip(it.runs, it.keys, it.values, strict=True):
        slots = token_slots(run.blocks, run.start, run.stop)
        for rows, numbers, scales in zip(
            given_rows, it.cache.tensors(SITE), it.cache.scales(SITE) or (), strict=True
        ):
            expected, expected_scales = quantized(rows[run.start :])
            found = scales[slots // BLOCK_TOKENS, :, slots % BLOCK_TOKENS]
            assert torch.equal(numbers[slots], expected)
            assert torch.allclose(found, expected_scales, rtol=0, atol=0, equal_nan=True)
