"""Attention and pointwise kernels for 64-bit Arm, cross-compiled and run under an emulator."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.native import DTYPES, INT8
from engine.kv_quantize import quantized

SOURCES = Path(__file__).parents[3] / "engine" / "kernels"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
LACKING = [it for it in (COMPILER, EMULATOR) if shutil.which(it) is None]
C_FILES = ("threads", "lanes_neon", "lanes_portable")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="runs as this machine's own"),
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"needs {' and '.join(LACKING)} (gcc-aarch64-linux-gnu, qemu-user-static)",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("arm") / "lanes"
    subprocess.run(
        [
            COMPILER, "-O2", "-std=gnu11", "-static", "-pthread", "-Wall", "-Werror",
            "-fno-math-errno", "-fno-trapping-math", f"-I{SOURCES}",
            *(SOURCES / f"{name}.c" for name in C_FILES),
            Path(__file__).with_name("lanes_main.c"), "-o", program, "-lm",
        ],
        check=True,
    )  # fmt: skip
    return program


def run_on_arm(program: Path, kernels: str, what: str, given: bytes, dtype: torch.dtype) -> Tensor:
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program, kernels, what],
        input=given,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    return torch.frombuffer(bytearray(done.stdout), dtype=dtype)


def held(rows: Tensor) -> Tensor:
    """What rows are once they were rounded to 8 bits, float64."""
    numbers, scales = quantized(rows)
    return numbers.double() * scales.double().unsqueeze(-1)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kernels", ["neon", "portable"])
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("in_8_bits", [False, True], ids=["plain", "8bits"])
@pytest.mark.parametrize(
    ("past", "new", "heads", "sizes", "softcap"),
    [(600, 1, (8, 2), (64, 64), 0.0), (100, 5, (6, 3), (24, 10), 3.0)],
)
def test_arm_attends_as_the_formula_says(
    program: Path,
    kernels: str,
    in_8_bits: bool,
    dtype: torch.dtype,
    past: int,
    new: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    softcap: float,
) -> None:
    torch.manual_seed(0)
    num_blocks = -(-(past + new) // 16)
    table = torch.randperm(num_blocks)
    keys, values = (torch.randn(num_blocks * 16, heads[1], it).to(dtype) for it in sizes)
    queries = torch.randn(new, heads[0], sizes[0]).to(dtype)
    scale = sizes[0] ** -0.5
    kinds = DTYPES[dtype], INT8 if in_8_bits else DTYPES[dtype]
    site = struct.pack("=13q2d", 0, 0, 0, 0, *kinds, *heads, *sizes, 0, 0, 0, scale, softcap)
    run = struct.pack("=5q2q", 0, new, past, 0, 1, num_blocks, num_blocks * 16)
    given = site + run + b"".join(map(raw, (table, keys, values, queries)))
    result = run_on_arm(program, kernels, "attention", given, dtype)
    slots = (table[:, None] * 16 + torch.arange(16)).flatten()[: past + new]
    group = heads[0] // heads[1]
    if in_8_bits:
        keys, values = map(held, (keys, values))
    k, v = (it[slots].double().repeat_interleave(group, 1) for it in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.arange(past + new)[None] <= torch.arange(past, past + new)[:, None]
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, v)
    difference = (result.view(expected.shape).double() - expected).abs().max()
    assert float(difference) <= CLOSE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("kernels", ["neon", "portable"])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_arm_norms_turns_and_gates_like_torch(
    program: Path, kernels: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, size = 3, 54
    x, other = (torch.randn(rows, size).to(dtype) for _ in range(2))
    other[1:] = other[0]
    given = struct.pack("=3q", rows, size, DTYPES[dtype]) + raw(x) + raw(other)
    results = run_on_arm(program, kernels, "pointwise", given, dtype).view(-1, rows, size)
    crossed = torch.cat((-x[:, size // 2 :], x[:, : size // 2]), dim=-1)
    expected = [
        functional.rms_norm(x.float(), (size,), None, 1e-5).to(dtype) * other[0],
        functional.silu(x) * other,
        functional.gelu(x) * other,
        functional.gelu(x, approximate="tanh") * other,
        functional.relu(x) * other,
        x * other + crossed * other,
    ]
    for result, wanted in zip(results, expected, strict=True):
        assert torch.allclose(
            result.float(), wanted.float(), rtol=2 * CLOSE[dtype], atol=CLOSE[dtype]
        )
