"""The kernels for 64-bit Arm, compiled by a cross compiler and run under an emulator."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.packed import FORMATS, PackedMatrix

SOURCES = Path(__file__).parents[3] / "engine" / "kernels"
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
LACKING = [it for it in (COMPILER, EMULATOR) if shutil.which(it) is None]
C_FILES = (
    "cpu", "threads", "linear", "linear_bf12", "linear_pack", "linear_portable", "linear_neon",
)  # fmt: skip

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="runs as this machine's own"),
    pytest.mark.skipif(
        bool(LACKING),
        reason=f"needs {' and '.join(LACKING)} (gcc-aarch64-linux-gnu, qemu-user-static)",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("arm") / "linear"
    subprocess.run(
        [
            COMPILER, "-O2", "-std=gnu11", "-static", "-pthread", "-Wall", "-Werror",
            "-fno-math-errno", "-fno-trapping-math", f"-I{SOURCES}",
            *(SOURCES / f"{name}.c" for name in C_FILES),
            Path(__file__).with_name("linear_main.c"), "-o", program,
        ],
        check=True,
    )  # fmt: skip
    return program


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernels", ["neon", "dotprod", "portable"])
def test_arm_packs_and_multiplies_like_this_machine(program, kernels, format):
    torch.manual_seed(0)
    for rows, cols, tokens in ((50, 130, 1), (33, 64, 3), (16, 99, 4), (64, 192, 21)):
        weight, x = torch.randn(rows, cols) * 0.1, torch.randn(tokens, cols).bfloat16().float()
        data, unpacked, y = run_on_arm(program, kernels, format, weight, x)
        here = PackedMatrix.pack(weight, format)
        packed_there = PackedMatrix(format, rows, cols, data)
        assert torch.equal(packed_there.unpack(torch.float32), unpacked)
        assert (unpacked - here.unpack(torch.float32)).norm() <= 0.02 * weight.norm()
        wanted = packed_there.matmul(x)
        assert (y - wanted).norm() <= 1e-2 * wanted.norm()  # ties of rounding


def run_on_arm(
    program: Path, kernels: str, format: str, weight: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed bytes, what they unpack to, and the product."""
    (rows, cols), tokens = weight.shape, len(x)
    sizes = struct.pack("<4q", FORMATS.index(format), rows, cols, tokens)
    given = sizes + weight.numpy().tobytes() + x.numpy().tobytes()
    done = subprocess.run(
        [EMULATOR, "-cpu", "max", program, kernels], input=given, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    size = PackedMatrix.num_bytes_of(format, rows, cols)
    data = torch.frombuffer(bytearray(done.stdout[:size]), dtype=torch.uint8)
    floats = torch.frombuffer(bytearray(done.stdout[size:]), dtype=torch.float32)
    unpacked, y = floats.split([rows * cols, tokens * rows])
    return data, unpacked.view(rows, cols), y.view(tokens, rows)
