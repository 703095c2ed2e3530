"""Norms, rotary positions and gated activations against torch, by every set of kernels here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from engine.kernels import native, pointwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, where a sum in another order may round to the other side.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 64, 80, 100, 576])
several = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=native.available())
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.chosen(request.param):
        yield request.param


def close(result: Tensor, expected: Tensor, roundings: int = 1) -> bool:
    """Equal but for the last bit, which a few numbers may have otherwise at each rounding."""
    assert result.dtype == expected.dtype
    tolerance = CLOSE[result.dtype] * roundings
    return torch.allclose(
        result.float(), expected.float(), rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True
    )


def mostly_equal(result: Tensor, expected: Tensor) -> bool:
    """Rounded at the same two places: nearly every number is the same bit for bit."""
    different = int((result != expected).sum())
    return close(result, expected, roundings=2) and different <= 2 + result.numel() // 50


@several
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    size=SIZES,
    gap=st.integers(0, 9),
    offset=st.sampled_from([0.0, 1.0]),
    with_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_an_rms_norm_rounds_as_the_models_do(
    kernels: str,
    dtype: torch.dtype,
    rows: int,
    size: int,
    gap: int,
    offset: float,
    with_residual: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, size + gap).to(dtype)[:, :size]
    weight = torch.randn(size).to(dtype)
    residual = torch.randn(rows, size).to(dtype) if with_residual else None
    total = x if residual is None else x + residual
    wide = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    if offset:
        expected = (wide * (1.0 + weight.float())).to(dtype)
    else:
        expected = weight * wide.to(dtype)
    result = pointwise.rms_norm(x, weight, 1e-6, offset, residual=residual)
    assert result.is_contiguous()
    if residual is not None:
        assert torch.equal(residual, total)
    if dtype == torch.float32:
        assert close(result, expected)
    else:
        assert mostly_equal(result, expected)


@several
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    size=SIZES,
    with_weight=st.booleans(),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_layer_norm_is_torchs(
    kernels: str,
    dtype: torch.dtype,
    rows: int,
    size: int,
    with_weight: bool,
    with_bias: bool,
    with_residual: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(rows, size) * 3 + 1).to(dtype)
    weight = torch.randn(size).to(dtype) if with_weight else None
    bias = torch.randn(size).to(dtype) if with_bias else None
    residual = torch.randn(rows, size).to(dtype) if with_residual else None
    total = x if residual is None else x + residual
    expected = functional.layer_norm(
        total.float(),
        (size,),
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
        1e-5,
    )
    result = pointwise.layer_norm(x, weight, bias, 1e-5, residual=residual)
    tolerance = max(CLOSE[dtype], 1e-5)
    assert torch.allclose(result.float(), expected, rtol=tolerance, atol=tolerance)


def test_heads_with_something_between_them_are_normed_where_they_lie(kernels: str) -> None:
    both = torch.randn(3, 10 * 24)
    heads = both[:, 48 : 48 + 5 * 24].view(3, 5, 24)
    weight = torch.randn(24)
    expected = functional.rms_norm(heads, (24,), weight, 1e-6)
    assert torch.allclose(pointwise.rms_norm(heads, weight, 1e-6), expected, atol=1e-5)
    every_second = both.view(3, 10, 24)[:, ::2]
    expected = functional.rms_norm(every_second, (24,), weight, 1e-6)
    assert torch.allclose(pointwise.rms_norm(every_second, weight, 1e-6), expected, atol=1e-5)


@several
@given(
    dtype=st.sampled_from(DTYPES),
    wide_tables=st.booleans(),
    tokens=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    half=st.sampled_from([1, 2, 5, 8, 16, 32, 48]),
    beyond=st.sampled_from([0, 3, 16]),
    seed=st.integers(0, 1000),
)
def test_rotary_positions_come_out_as_transformers_has_them(
    kernels: str,
    dtype: torch.dtype,
    wide_tables: bool,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    beyond: int,
    seed: int,
) -> None:
    """On queries and keys that lie side by side in one tensor, with values behind them."""
    torch.manual_seed(seed)
    size = 2 * half + beyond
    both = torch.randn(tokens, (heads[0] + 2 * heads[1]) * size).to(dtype)
    before = both.clone()
    stop = (heads[0] + heads[1]) * size
    query = both[:, : heads[0] * size].view(tokens, heads[0], size)
    key = both[:, heads[0] * size : stop].view(tokens, heads[1], size)
    angles = torch.randn(tokens, 2 * half) * 3
    tables = torch.float32 if wide_tables else dtype
    cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    expected = [turned(it.clone(), cos, sin) for it in (query, key)]
    pointwise.rope(query, key, cos, sin)
    for result, wanted in zip((query, key), expected, strict=True):
        if dtype == torch.float32 or wide_tables:
            scale = float(wanted.float().abs().max())
            difference = (result.float() - wanted.float()).abs().max()
            assert difference <= 2 * CLOSE[dtype] * max(scale, 1.0)
        else:
            assert torch.equal(result, wanted)
    assert torch.equal(both[:, stop:], before[:, stop:])


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    some, rest = heads[..., :size], heads[..., size:]
    crossed = torch.cat((-some[..., size // 2 :], some[..., : size // 2]), dim=-1)
    some = (some * cos[:, None] + crossed * sin[:, None]).to(heads.dtype)
    return torch.cat([some, rest], dim=-1)


@several
@given(
    kind=st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    size=SIZES,
    side_by_side=st.booleans(),
    width=st.sampled_from([0.1, 3.0, 60.0]),
    seed=st.integers(0, 1000),
)
def test_a_gated_activation_is_torchs(
    kernels: str,
    kind: str,
    dtype: torch.dtype,
    rows: int,
    size: int,
    side_by_side: bool,
    width: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    both = (torch.randn(rows, 2 * size) * width).to(dtype)
    gate, up = both[:, :size], both[:, size:]
    function = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }[kind]
    expected = function(gate) * up
    result = pointwise.gated(kind, both) if side_by_side else pointwise.gated(kind, gate, up)
    assert result.is_contiguous()
    tolerance = CLOSE[dtype] * 2
    # Where the gate is almost shut, 1 + tanh has lost its digits: what is left is of gate * up.
    scale = max(float((gate.float() * up.float()).abs().max()), 1.0)
    assert torch.allclose(
        result.float(), expected.float(), rtol=tolerance, atol=tolerance * 0.1 * scale
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so(kernels: str, dtype: torch.dtype, bad: float) -> None:
    x = torch.zeros(1, 40, dtype=dtype)
    x[0, 33] = bad
    ones = torch.ones(40, dtype=dtype)
    assert pointwise.rms_norm(x, ones, 1e-6)[0, 33].isnan()
    assert pointwise.layer_norm(x, ones, None, 1e-6).isnan().all()
    for kind in ("silu", "gelu", "gelu_tanh", "relu"):
        result = pointwise.gated(kind, x, ones[None])
        assert not result[0, 33].isfinite()
        assert result[0, :33].isfinite().all()
    if bad != bad:
        table = torch.ones(1, 40, dtype=dtype)
        heads = x.view(1, 1, 40).clone()
        pointwise.rope(heads, None, table, table)
        assert heads[0, 0, 33].isnan()
        assert heads[0, 0, 13].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read_and_written_as_it_is(
    kernels: str, dtype: torch.dtype
) -> None:
    """An activation that changes nothing that is positive, times one."""
    numbers = torch.arange(2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()][None]
    assert torch.equal(pointwise.gated("relu", numbers, torch.ones_like(numbers)), numbers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_goes_to_the_nearest_and_ties_to_the_even(
    kernels: str, dtype: torch.dtype
) -> None:
    """Products of two numbers of 16 bits, over all magnitudes, subnormal and infinite ones too."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.randint(0, 2**15, (1, 20000), generator=generator).to(torch.int16).view(dtype)
        for _ in range(2)
    )
    one = one.nan_to_num(1.0)
    expected = one * other
    result = pointwise.gated("relu", one, other)
    same = (result == expected) | (result.isnan() & expected.isnan())
    assert bool(same.all())
