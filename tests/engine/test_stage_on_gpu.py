"""A stage on a GPU: the same numbers as on the CPU, by torch's operators and recorded steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention import StageRun
from engine.decode_graphs import DecodeGraphs
from engine.device_weights import device_seconds
from engine.joined_linear import joined_of
from engine.kernels.device_matrix import DeviceMatrix, Int4Matrix, Int8Matrix
from engine.kernels.device_operators import Order, operators_of
from engine.kernels.packed import PackedMatrix
from engine.lean.agreement import agrees
from engine.selfcheck import relative_error
from engine.stage import Stage
from engine.stage_loading import load_stage
from tests.support.models import save_tiny

pytestmark = pytest.mark.gpu

LENGTHS = (3, 190, 40)
QUANTIZATIONS = ["none", "int8", "int4"]


def load(folder: Path, device: str, quantize: str = "none", **settings: bool) -> Stage:
    return load_stage(
        str(folder), sections=1, index=0, dtype="bfloat16", device=device, quantize=quantize,
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def decoded(stage: Stage, steps: int = 8, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Hidden states and logits of some sequences, decoded a few tokens far, on the CPU."""
    counts = [(length + steps) // 16 + 1 for length in lengths]
    tables = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)).split(counts)
    cache = stage.new_cache(sum(counts))
    generator = torch.Generator().manual_seed(6)
    results = []
    for length, table in zip(lengths, tables, strict=True):
        run = StageRun(start=0, num_tokens=length, rope_length=length + steps, blocks=table)
        hidden = torch.randn(length, stage.hidden_size, generator=generator).bfloat16()
        results.append(stage.forward(torch.arange(length) % 50, hidden, [run], cache)[-1:])
    for step in range(steps):
        runs = [
            StageRun(start=it + step, num_tokens=1, rope_length=it + steps, blocks=table)
            for it, table in zip(lengths, tables, strict=True)
        ]
        hidden = torch.randn(len(runs), stage.hidden_size, generator=generator).bfloat16()
        results.append(stage.forward(torch.arange(len(runs)), hidden, runs, cache))
    out = torch.cat(results)
    return torch.cat([out.float().cpu(), stage.logits(out).cpu()], dim=1)


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "phi3", "mixtral"])
def test_a_gpu_gives_what_the_cpu_gives(kind: str, quantize: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    expected = decoded(load(tmp_path, "cpu", quantize))
    stage = load(tmp_path, "cuda", quantize)
    assert stage.attends_at_once and stage.plain_layers == []
    assert relative_error(decoded(stage), expected) < (0.1 if quantize == "none" else 0.35)


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_played_steps_give_what_steps_give(quantize: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "cuda", quantize)
    assert isinstance(stage.graphs, DecodeGraphs)
    played = decoded(stage)
    assert stage.graphs.why_off is None
    without = load(tmp_path, "cuda", quantize, cuda_graphs=False)
    assert without.graphs is None
    assert relative_error(played, decoded(without)) < 0.05


def test_recordings_free_the_memory_of_their_lease(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "cuda")
    decoded(stage)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        decoded(stage)
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_are_multiplied_by_torchs_operators(
    quantize: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path)
    stage = load(tmp_path, "cuda", quantize)
    matrices = [it for module in stage.packed.modules.values() for it in module.matrices()]
    assert matrices and all(isinstance(it, DeviceMatrix) for it in matrices)


def test_siblings_in_16_bits_are_multiplied_at_once(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    layer = load(tmp_path, "cuda").slots[0].inner
    assert layer is not None
    assert set(joined_of(layer.self_attn)) == {"qkv"}  # type: ignore[arg-type]
    assert set(joined_of(layer.mlp)) == {"gate_up"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (176, 96), (50, 70), (4096, 1024)])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_operators_of_a_gpu_multiply_as_packed_matrices_do(
    format: str, rows: int, cols: int
) -> None:
    device = torch.device("cuda")
    operators = operators_of(device)
    assert operators is not None
    packed = PackedMatrix.pack(torch.randn(rows, cols, device=device) * 0.1, format)
    found: list[DeviceMatrix] = [Int8Matrix.of(packed, operators)]
    if format == "int4":
        orders = [Order.learnt(operators, tile, device) for tile in operators.tiles]
        assert None not in orders
        found = [Int4Matrix.of(packed, operators, it) for it in orders if it is not None]
    for matrix in found:
        assert torch.equal(matrix.unpack(torch.bfloat16), packed.unpack(torch.bfloat16))
        for tokens in (1, 16, 33):
            x = torch.randn(tokens, cols, device=device).bfloat16()
            expected = torch.nn.functional.linear(x, packed.unpack(torch.bfloat16))
            assert agrees(matrix.by_operator(x), expected)
            assert agrees(matrix.by_product(x), expected)
            assert device_seconds(device)(lambda x=x, it=matrix: it.by_operator(x)) > 0
