"""A stage's quantized weights, handed to torch's operators; here to those that it has for a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention import StageRun
from engine.decode_fitting import fit_decoding
from engine.device_weights import Handover, hand_over, most_tokens
from engine.experts import PackedExperts
from engine.kernels import native
from engine.kernels.device_matrix import DeviceMatrix, Int8Matrix
from engine.kernels.packed import PackedMatrix
from engine.lean.fitting import fit_layers
from engine.packed_linear import PackedLinear, fused_of
from engine.selfcheck import check_stage, relative_error
from engine.stage import Stage
from engine.stage_loading import load_stage
from tests.support.device_operators import CPU_OPERATORS, missing, wrong
from tests.support.models import save_tiny
from tests.support.recording import run_again

CPU = torch.device("cpu")


def load(folder: Path, quantize: str, dtype: str = "bfloat16") -> Stage:
    with native.chosen("torch"):  # which leaves the weights packed and multiplies by torch
        return load_stage(
            str(folder), sections=1, index=0, dtype=dtype, device="cpu", quantize=quantize
        )


def outcome(stage: Stage) -> Tensor:
    hidden = torch.randn(20, stage.hidden_size, generator=torch.Generator().manual_seed(3))
    run = StageRun(start=0, num_tokens=20, rope_length=20, blocks=torch.tensor([1, 0]))
    ids = torch.arange(20)
    with native.chosen("torch"):
        made = stage.forward(ids, hidden.to(stage.dtype), [run], stage.new_cache(2))
        return torch.cat([made.float(), stage.logits(made)], dim=1)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama_biases", "phi3", "gpt2", "mixtral"])
def test_a_stage_computes_the_same_by_the_operators(
    kind: str, quantize: str, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path)
    stage = load(tmp_path, quantize)
    before, packed_bytes = outcome(stage), stage.packed.packed_bytes
    done = hand_over(stage.packed, stage.dtype, CPU, CPU_OPERATORS)
    assert not done.left and set(done.converted) == {quantize, "int8"}  # and the head
    matrices = [it for module in stage.packed.modules.values() for it in module.matrices()]
    assert all(isinstance(it, DeviceMatrix) for it in matrices)
    assert 0.5 * packed_bytes < stage.packed.packed_bytes < 3 * packed_bytes
    stage.run_plainly()
    assert relative_error(outcome(stage), before) < 0.1
    fit_layers(stage)
    assert stage.plain_layers == []
    assert relative_error(outcome(stage), before) < 0.1


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_an_unloaded_stage_holds_none_of_it(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load(tmp_path, "int4")
    hand_over(stage.packed, stage.dtype, CPU, CPU_OPERATORS)
    matrices = [it for module in stage.packed.modules.values() for it in module.matrices()]
    matrices += [it.matrix for it in stage.packed.fused]
    stage.unload()
    assert not any(it.data.numel() for it in matrices)


def test_siblings_are_converted_once_and_share_the_memory(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "int8")
    hand_over(stage.packed, stage.dtype, CPU, CPU_OPERATORS)
    layer = stage.slots[0].inner
    assert layer is not None
    together = fused_of(layer.self_attn)["qkv"].matrix  # type: ignore[arg-type]
    own = layer.self_attn.k_proj.matrix  # type: ignore[union-attr]
    assert isinstance(together, Int8Matrix) and isinstance(own, Int8Matrix)
    assert own.data.data_ptr() == together.data[32:48].data_ptr()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_operators_that_are_missing_or_wrong_are_left_alone_with_one_line(
    quantize: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, quantize)
    before = outcome(stage)
    for operators, why in (
        (missing(CPU_OPERATORS), "Could not run 'aten::_weight_int"),
        (wrong(CPU_OPERATORS), "its operator gives other numbers for 64 x 32"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "comboio.engine"):
            done = hand_over(stage.packed, stage.dtype, CPU, operators)
        assert not done.converted and set(done.left) == {quantize, "int8"}
        assert why in done.left[quantize]
        lines = [it.getMessage() for it in caplog.records]
        assert len(lines) == len(done.left) and all("\n" not in it for it in lines)
        assert f"{quantize} weights are widened at each call on this device" in lines[0]
        assert torch.equal(outcome(stage), before)


def test_int4_in_another_type_than_bfloat16_stays_packed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "int4", dtype="float16")
    done = hand_over(stage.packed, stage.dtype, CPU, CPU_OPERATORS)
    assert done.left["int4"] == "torch's operator takes bfloat16, this stage has torch.float16"
    assert set(done.converted) == {"int8"}


def paces(operator_s: float, product_s: float) -> Callable[[Callable[[], Tensor]], float]:
    """A clock for an operator that takes so long for each 16 tokens, and a product for any."""
    turns = iter(range(10**6))
    tokens = iter(it for count in (1, 16, 32, 64, 128, 256, 512, 1024) for it in (count, count))

    def seconds(call: Callable[[], Tensor]) -> float:
        call()
        count = next(tokens)
        return operator_s * -(-count // 16) if next(turns) % 2 == 0 else product_s

    return seconds


@pytest.mark.parametrize(
    ("operator_s", "product_s", "expected"),
    [(1.0, 0.5, 0), (1.0, 1.0, 16), (1.0, 9.0, 128), (1.0, 100.0, 1024)],
)
def test_an_operator_gets_the_tokens_that_it_multiplies_faster(
    operator_s: float, product_s: float, expected: int
) -> None:
    matrix = Int8Matrix.of(PackedMatrix.pack(torch.randn(64, 64), "int8"), CPU_OPERATORS)
    clock = paces(operator_s, product_s)
    assert most_tokens(matrix, torch.bfloat16, CPU, clock) == expected


def test_what_does_not_fit_counts_as_slow() -> None:
    matrix = Int8Matrix.of(PackedMatrix.pack(torch.randn(64, 64), "int8"), CPU_OPERATORS)

    def fails_in(way: str) -> Callable[[Callable[[], Tensor]], float]:
        def seconds(call: Callable[[], Tensor]) -> float:
            if way in repr(call) and len(call.args[0]) > 16:  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("out of memory")
            return 1.0 if "by_operator" in repr(call) else 2.0

        return seconds

    assert most_tokens(matrix, torch.bfloat16, CPU, fails_in("by_operator")) == 16
    assert most_tokens(matrix, torch.bfloat16, CPU, fails_in("by_product")) == 1024


def test_what_was_measured_holds_for_every_matrix_of_its_format(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    stage = load(tmp_path, "int8")
    done: Handover = hand_over(
        stage.packed, stage.dtype, CPU, CPU_OPERATORS, paces(operator_s=1.0, product_s=4.0)
    )
    assert done.most_tokens == {"int8": 64}
    for module in stage.packed.modules.values():
        assert isinstance(module, (PackedLinear, PackedExperts))
        for it in module.matrices():
            assert isinstance(it, DeviceMatrix) and it.most_tokens == 64


def test_a_stage_decodes_with_all_of_it_together(tmp_path: Path) -> None:
    """What is done to a quantized stage on a GPU, one after the other."""
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "int4")
    before = outcome(stage)
    with native.chosen("torch"):
        hand_over(stage.packed, stage.dtype, CPU, CPU_OPERATORS)
        fit_layers(stage)
        check_stage(stage)
        fit_decoding(stage, run_again)
    assert stage.plain_layers == [] and stage.attends_at_once and stage.graphs is not None
    assert relative_error(outcome(stage), before) < 0.1
