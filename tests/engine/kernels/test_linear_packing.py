from __future__ import annotations

import resource

import pytest
import torch

from engine.kernels import huge_pages, native
from engine.kernels.huge_pages import HUGE_PAGE
from engine.kernels.packed import FORMATS, DoesNotFit, PackedMatrix

ALL = native.available()
# Of normally distributed weights, relative to their norm.
ERRORS = {"bf16": 0.002, "bf12": 0.002, "int8": 0.009, "int4": 0.085}


@pytest.fixture(autouse=True)
def _kernels_are_put_back():
    torch.manual_seed(0)
    with native.chosen(native.AUTO):
        yield


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", ALL)
def test_what_is_unpacked_is_near_what_was_packed(kernels, format):
    native.choose(kernels)
    for rows, cols in ((64, 1024), (37, 100), (1, 7), (33, 321)):
        weight = torch.randn(rows, cols) * 0.02
        unpacked = PackedMatrix.pack(weight, format).unpack(torch.float32)
        assert unpacked.shape == weight.shape
        assert (unpacked - weight).norm() <= ERRORS[format] * weight.norm() * (1 + 8 / cols)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", ALL)
def test_every_kernel_reads_what_every_other_has_packed(kernels, format):
    weight = torch.randn(50, 150)
    packed = PackedMatrix.pack(weight, format)
    reference = packed.unpack(torch.float32)
    native.choose(kernels)
    assert torch.equal(packed.unpack(torch.float32), reference)
    # Ties of the search for a scale may fall either way, and no more.
    mine = PackedMatrix.pack(weight, format).unpack(torch.float32)
    error, least = (mine - weight).norm(), (reference - weight).norm()
    assert error == pytest.approx(least.item(), rel=1e-3)
    if format != "int4":
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", ALL)
def test_the_source_may_have_any_strides(kernels, format, dtype):
    native.choose(kernels)
    weight = torch.randn(48, 99).to(dtype)
    packed = PackedMatrix.pack(weight, format)
    transposed = weight.t().contiguous().t()
    within = torch.zeros(96, 198, dtype=dtype)[::2, ::2]
    within.copy_(weight)
    for same in (transposed, within):
        assert torch.equal(PackedMatrix.pack(same, format).data, packed.data)


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_comes_back_bit_for_bit_from_16_bits_and_zeros_from_all(format):
    weight = torch.randn(40, 70).bfloat16()
    if format in ("bf16", "bf12"):
        assert torch.equal(PackedMatrix.pack(weight, format).unpack(torch.bfloat16), weight)
    zeros = PackedMatrix.pack(torch.zeros(40, 70), format)
    assert not zeros.unpack(torch.float32).any()
    assert not zeros.matmul(weight).any()


@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_filled_in_parts_or_joined_from_parts_is_the_whole(format):
    weight = torch.randn(90, 130).bfloat16()
    whole = PackedMatrix.pack(weight, format)
    filled = PackedMatrix.allocate(format, 90, 130)
    for start, stop in ((64, 90), (0, 16), (16, 64)):
        filled.part(start, stop).fill(weight[start:stop])
    joined = PackedMatrix.concatenated(
        [PackedMatrix.pack(it, format) for it in (weight[:32], weight[32:80], weight[80:])]
    )
    assert torch.equal(filled.data, whole.data)
    assert torch.equal(joined.data, whole.data)
    assert joined.rows == 90


@pytest.mark.parametrize("bad", [(8, 16), (0, 24), (16, 16), (0, 200), (-16, 16)])
def test_a_part_that_cuts_a_strip_is_refused(bad):
    with pytest.raises(ValueError, match="multiples of 16"):
        PackedMatrix.allocate("int8", 90, 64).part(*bad)


def test_four_bits_never_do_worse_than_the_largest_weight_at_minus_eight():
    weight = torch.randn(64, 512)
    groups = weight.unflatten(1, (-1, 32))
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = extreme / -8
    plain = (torch.round(groups / scale).clamp(-8, 7) * scale).flatten(1)
    searched = PackedMatrix.pack(weight, "int4").unpack(torch.float32)
    assert (searched - weight).norm() < 0.95 * (plain - weight).norm()


def test_tiny_and_huge_weights_keep_their_scale():
    for size in (1e-20, 1e-6, 1e20):
        weight = torch.randn(16, 64) * size
        for format in FORMATS:
            unpacked = PackedMatrix.pack(weight, format).unpack(torch.float32)
            error = (unpacked.double() - weight.double()).norm()
            assert error <= 1.2 * ERRORS[format] * weight.double().norm()


def test_matrices_lie_one_behind_the_other_in_huge_pages():
    huge_pages.new_mapping()
    first, second = (PackedMatrix.allocate("int4", 1536, 1024) for _ in range(2))
    assert first.data.data_ptr() % HUGE_PAGE == 0
    assert second.data.data_ptr() == first.data.data_ptr() + first.num_bytes
    large = PackedMatrix.allocate("bf16", 32768, 1024)
    assert large.data.numel() == PackedMatrix.num_bytes_of("bf16", 32768, 1024)
    huge_pages.new_mapping()
    third = PackedMatrix.allocate("int4", 1536, 1024)
    assert third.data.data_ptr() % HUGE_PAGE == 0
    for number, it in enumerate((first, second, third)):
        it.data.fill_(number)
    assert [int(it.data.max()) for it in (first, second, third)] == [0, 1, 2]


def test_the_memory_of_matrices_goes_with_the_last_of_them():
    huge_pages.new_mapping()
    before = resident_bytes()
    matrices = [PackedMatrix.allocate("int8", 3072, 1024) for _ in range(60)]
    for it in matrices:
        it.data.fill_(1)
    filled = resident_bytes() - before
    assert abs(filled - 60 * matrices[0].num_bytes) < 3 * HUGE_PAGE
    del matrices, it
    assert resident_bytes() - before < HUGE_PAGE


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("kernels", ALL)
def test_12_bits_hold_zeros_outliers_tiny_weights_and_what_is_no_number_exactly(kernels):
    native.choose(kernels)
    for rows, cols in ((16, 32), (37, 300), (130, 2048)):
        plain = (torch.randn(rows, cols) * 0.02).bfloat16()
        pruned = torch.where(torch.rand(rows, cols) < 0.5, -0.0, plain)
        odd = plain.clone()
        few = torch.rand(rows, cols) < 1 / 1024
        odd[few] *= torch.where(torch.rand(int(few.sum())) < 0.5, 1e6, 1e-9).bfloat16()
        odd[0, :4] = torch.tensor([torch.inf, -torch.inf, 1e-40, -0.0])
        for weight in (plain, pruned, odd):
            packed = PackedMatrix.pack(weight, "bf12")
            if cols == 2048 and rows % 16 == 2:  # nine strips for 130 rows
                assert packed.data.numel() < 0.78 * 144 * cols * 2
            same = packed.unpack(torch.bfloat16)
            assert torch.equal(same.view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("kernels", ALL)
def test_weights_of_all_sizes_at_once_do_not_fit_12_bits(kernels):
    native.choose(kernels)
    anything = torch.randint(-(2**15), 2**15, (32, 256), dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(DoesNotFit):
        PackedMatrix.pack(anything, "bf12")


@pytest.mark.parametrize("kernels", ALL)
def test_a_list_of_12_bits_that_was_damaged_leads_nowhere_else(kernels):
    native.choose(kernels)
    packed = PackedMatrix.pack(torch.randn(16, 64).bfloat16(), "bf12")
    packed.data[16:] = 255  # says 2**32 - 1 listed weights, at places beyond the matrix
    packed.unpack(torch.float32)
    packed.data[16:20] = torch.tensor([12, 0, 0, 0], dtype=torch.uint8)
    packed.unpack(torch.float32)
    for tokens in (1, 4, 40):
        packed.matmul(torch.randn(tokens, 64).bfloat16())
