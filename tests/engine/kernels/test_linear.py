from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.packed import FORMATS, PackedMatrix

KERNELS = [it for it in native.available() if it != native.TORCH]
MANY = (*range(1, 18), 31, 64, 200)
SHAPES = ((64, 128), (37, 100), (16, 33), (1, 7), (130, 257))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _kernels_and_threads_are_put_back():
    torch.manual_seed(0)
    with native.chosen(native.AUTO):
        yield
    native.set_threads(1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_number_of_tokens_is_multiplied_as_the_packed_weights_say(kernels, format):
    native.choose(kernels)
    for rows, cols in SHAPES:
        packed = PackedMatrix.pack(torch.randn(rows, cols) * 0.1, format)
        weight = packed.unpack(torch.float32)
        for tokens in MANY:
            x = torch.randn(tokens, cols).bfloat16()
            y = packed.matmul(x, out=torch.empty(tokens, rows))
            # With fused multiply-add a tie in rounding a token may fall the other way.
            assert_close(
                y, expected(x, weight, format), 2e-5 if format in ("bf16", "bf12") else 1e-2
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_dtype_comes_in_and_goes_out(kernels, format, dtype):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(50, 70) * 0.1, format)
    weight = packed.unpack(torch.float32)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 70).to(dtype)
        y = packed.matmul(x)
        assert y.dtype == dtype
        # Tokens may be rounded to bfloat16, the result is rounded to its dtype.
        assert_close(y, expected(x, weight, format), 6e-3)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bias_and_residual_are_added_before_the_result_is_rounded(kernels):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(37, 64) * 0.1, "bf16")
    for tokens, dtype in itertools.product((1, 5, 40), DTYPES):
        x = torch.randn(tokens, 64).bfloat16()
        bias, residual = torch.randn(37).to(dtype), torch.randn(tokens, 37).to(dtype)
        exact = packed.matmul(x, out=torch.empty(tokens, 37))
        both = packed.matmul(x, bias, residual, out=torch.empty(tokens, 37))
        assert_close(both, exact + bias.float() + residual.float(), 1e-6)
        assert torch.equal(packed.matmul(x, bias, residual), both.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_the_result_may_take_the_residuals_place(format):
    packed = PackedMatrix.pack(torch.randn(48, 64), format)
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 48).bfloat16()
    expected = packed.matmul(x, residual=residual)
    assert packed.matmul(x, residual=residual, out=residual) is residual
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_part_is_those_rows_of_the_whole(kernels, format):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(100, 96), format)
    for start, stop in ((0, 16), (16, 80), (80, 100), (0, 100)):
        part = packed.part(start, stop)
        assert part.data.data_ptr() == packed.data.data_ptr() + start * packed.data.numel() // 112
        x = torch.randn(4, 96).bfloat16()
        assert torch.equal(part.matmul(x), packed.matmul(x)[:, start:stop])
        assert torch.equal(part.unpack(torch.float32), packed.unpack(torch.float32)[start:stop])


@pytest.mark.parametrize("format", FORMATS)
def test_leading_dimensions_and_strides_of_tokens_change_nothing(format):
    packed = PackedMatrix.pack(torch.randn(32, 64), format)
    x = torch.randn(2, 3, 64).bfloat16()
    flat = packed.matmul(x.reshape(6, 64))
    assert torch.equal(packed.matmul(x), flat.view(2, 3, 32))
    assert torch.equal(packed.matmul(x.transpose(0, 1)), flat.view(2, 3, 32).transpose(0, 1))
    assert packed.matmul(x[:0]).shape == (0, 3, 32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_number_of_threads_changes_no_bit(kernels, format):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(700, 512), format)
    for tokens in (1, 7, 40):
        x = torch.randn(tokens, 512).bfloat16()
        results = []
        for threads in (1, 2, 3):
            native.set_threads(threads)
            results.append(packed.matmul(x))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_callers_on_several_threads_share_the_pool():
    native.set_threads(2)
    packed = PackedMatrix.pack(torch.randn(700, 512), "int4")
    x = torch.randn(3, 512).bfloat16()
    wanted = packed.matmul(x)
    wrong = []

    def call():
        wrong.extend(1 for _ in range(50) if not torch.equal(packed.matmul(x), wanted))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    native.set_threads(2)
    packed = PackedMatrix.pack(torch.randn(700, 512), "bf16")
    x = torch.randn(3, 512).bfloat16()
    wanted = packed.matmul(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(packed.matmul(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_not_a_number_stays_one_and_only_in_its_own_token(kernels, format):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(32, 128), format)
    for tokens in (3, 20):
        x = torch.randn(tokens, 128).bfloat16()
        x[1, 5] = float("nan")
        x[2, 70] = float("inf")
        y = packed.matmul(x)
        assert y[1].isnan().all()
        assert not y[2].isfinite().any()
        assert y[0].isfinite().all()
        assert y[3:].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_without_kernels_torch_gives_the_same(format):
    packed = PackedMatrix.pack(torch.randn(50, 100), format)
    x, bias, residual = torch.randn(3, 100), torch.randn(50), torch.randn(3, 50)
    y = packed.matmul(x, bias, residual)
    native.choose(native.TORCH)
    assert_close(y, packed.matmul(x, bias, residual), 2e-2)  # torch does not round the tokens


def expected(x: Tensor, weight: Tensor, format: str) -> Tensor:
    """In double precision, with the tokens as the kernels round them."""
    return (x if format in ("bf16", "bf12") else rounded_to_8_bits(x)).double() @ weight.double().T


def rounded_to_8_bits(x: Tensor) -> Tensor:
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 64)).unflatten(1, (-1, 64))
    largest = groups.abs().amax(2, keepdim=True)
    # Not 127 / largest: torch makes that 127 * (1 / largest), which rounds twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    whole = torch.round(groups * inverse)
    return (whole * (largest / 127.0)).flatten(1)[:, : x.shape[1]]


def assert_close(given: Tensor, wanted: Tensor, error: float) -> None:
    given, wanted = given.double(), wanted.double()
    assert given.shape == wanted.shape
    assert (given - wanted).norm() <= error * wanted.norm()
