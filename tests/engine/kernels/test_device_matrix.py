"""Packed weights in the order of torch's operators: tried by those that it has for a CPU."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.device_matrix import DeviceMatrix, Int4Matrix, Int8Matrix, RowsOf
from engine.kernels.device_operators import Order, Tile, operators_of
from engine.kernels.packed import PackedMatrix
from engine.lean.agreement import agrees
from tests.support.device_operators import CPU_OPERATORS, CPU_TILE, forgetful, like_a_gpu

# Of whole tiles, of whole strips, and of neither.
SHAPES = [(64, 64), (128, 192), (176, 96), (50, 70), (16, 32), (200, 1000)]


def matrices(format: str, rows: int, cols: int) -> tuple[PackedMatrix, DeviceMatrix]:
    torch.manual_seed(rows)
    packed = PackedMatrix.pack(torch.randn(rows, cols) * 0.1, format)
    if format == "int8":
        return packed, Int8Matrix.of(packed, CPU_OPERATORS)
    order = Order.learnt(CPU_OPERATORS, CPU_TILE, torch.device("cpu"))
    assert order is not None
    return packed, Int4Matrix.of(packed, CPU_OPERATORS, order)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_numbers_stay_what_they_were(format: str, rows: int, cols: int) -> None:
    packed, found = matrices(format, rows, cols)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(found.unpack(dtype), packed.unpack(dtype))


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_products_are_those_of_the_packed_matrix(
    format: str, rows: int, cols: int, tokens: int
) -> None:
    packed, found = matrices(format, rows, cols)
    x, bias = torch.randn(tokens, cols).bfloat16(), torch.randn(rows)
    residual = torch.randn(tokens, rows).bfloat16()
    plain = torch.nn.functional.linear(x, packed.unpack(torch.bfloat16))
    for most_tokens in (0, 16, 64):  # widened, one or the other, by the operator
        found.most_tokens = most_tokens
        assert agrees(found.matmul(x), plain)
        assert agrees(found.matmul(x, bias), plain + bias.bfloat16())
        out = torch.empty_like(plain)
        assert found.matmul(x, bias, residual, out) is out
        assert agrees(out, plain + bias.bfloat16() + residual, slack=2)
    three = found.matmul(x.view(1, tokens, cols))
    assert three.shape == (1, tokens, rows) and torch.equal(three[0], found.matmul(x))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_part_has_the_rows_of_the_whole_wherever_it_is_cut(format: str) -> None:
    packed, found = matrices(format, 200, 96)
    x = torch.randn(3, 96).bfloat16()
    for start, stop in ((0, 64), (64, 128), (128, 200), (16, 80), (0, 200), (80, 200)):
        part, theirs = found.part(start, stop), packed.part(start, stop)
        assert torch.equal(part.unpack(torch.float32), theirs.unpack(torch.float32))
        assert agrees(part.matmul(x), found.matmul(x)[:, start:stop].contiguous())
        within = part.part(16, stop - start)
        assert torch.equal(within.unpack(torch.float32), theirs.unpack(torch.float32)[16:])
    assert isinstance(found.part(16, 80), RowsOf) == (format == "int4")


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_tokens_that_the_operator_does_not_take_go_by_the_product(format: str) -> None:
    packed, found = matrices(format, 64, 64)
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(4, 64, dtype=dtype)
        expected = torch.nn.functional.linear(x, packed.unpack(dtype))
        found.most_tokens = 0 if format == "int8" else 64
        assert agrees(found.matmul(x), expected)


def test_large_sums_stay_numbers_in_float16() -> None:
    packed, found = matrices("int8", 64, 1024)
    found.most_tokens = 0
    x = torch.full((2, 1024), 30.0, dtype=torch.float16) * packed.unpack(torch.float16)[0].sign()
    result = found.matmul(x)
    assert bool(result.isfinite().all())
    assert agrees(result, torch.nn.functional.linear(x, packed.unpack(torch.float16)))


def test_an_order_that_is_none_is_not_learnt() -> None:
    here = torch.device("cpu")
    for tile in (Tile(1, 8, 64), Tile(1, 16, 1), Tile(1, 32, 32)):  # numbers of others between
        assert Order.learnt(CPU_OPERATORS, tile, here) is None
    assert Order.learnt(forgetful(CPU_OPERATORS), CPU_TILE, here) is None


def test_memory_is_counted_and_matrices_are_not_filled_again() -> None:
    _, int8 = matrices("int8", 128, 128)
    _, int4 = matrices("int4", 128, 128)
    assert int8.num_bytes == 128 * 128 + 128 * 4
    assert int4.num_bytes == 128 * 128 * 5 // 8
    assert int4.part(0, 64).num_bytes == int4.num_bytes // 2
    assert int4.part(16, 32).num_bytes == 0
    with pytest.raises(ValueError, match="takes no other weights"):
        int4.fill(torch.zeros(128, 128))


@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_layout_of_a_gpu_is_understood(rows: int, cols: int, inner: int) -> None:
    operators = like_a_gpu(inner)
    order = Order.learnt(operators, operators.tiles[0], torch.device("cpu"))
    assert order is not None
    packed, _ = matrices("int8", rows, cols)
    packed = PackedMatrix.pack(packed.unpack(torch.float32), "int4")
    found = Int4Matrix.of(packed, operators, order)
    x = torch.randn(5, cols).bfloat16()
    expected = torch.nn.functional.linear(x, packed.unpack(torch.bfloat16))
    assert torch.equal(found.unpack(torch.float32), packed.unpack(torch.float32))
    assert agrees(found.by_operator(x), expected) and agrees(found.by_product(x), expected)
    if rows > 32:  # parts of it are cut wherever packed ones can be
        part = found.part(16, 32)
        assert isinstance(part, Int4Matrix)
        assert torch.equal(part.unpack(torch.bfloat16), packed.part(16, 32).unpack(torch.bfloat16))
        assert agrees(part.by_operator(x), expected[:, 16:32].contiguous())


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_operators_of_a_gpu_are_given_shapes_and_types_that_they_take(
    format: str, rows: int, cols: int
) -> None:
    """By torch's own description of them, which computes nothing."""
    meta = torch.device("meta")
    operators = operators_of(torch.device("cuda"))
    assert operators is not None
    data = PackedMatrix.allocate(format, rows, cols).data.to(meta)
    packed = PackedMatrix(format, rows, cols, data)
    x = torch.empty(5, cols, dtype=torch.bfloat16, device=meta)
    if format == "int8":
        y = Int8Matrix.of(packed, operators).by_operator(x)
        assert (y.shape, y.dtype) == ((5, rows), torch.bfloat16)
        return
    for tile in operators.tiles:
        places = torch.empty(tile.rows * tile.cols, dtype=torch.int64, device=meta)
        found = Int4Matrix.of(packed, operators, Order(tile, places))
        padded = -(-cols // 64) * 64  # as packed ones are
        assert found.data.shape[:2] == (-(-rows // 16) * 2, -(-padded // tile.cols))
        assert found.data.shape[2:] == (32, tile.inner // 2)
        assert found.unpack(torch.bfloat16).shape == (rows, cols)
