"""Weights read per second by the packed kernels, against what the memory gives one thread.

    python bench/kernels.py [--rows 5632] [--cols 2048] [--tokens 1,4,8,16] [--threads 1] [--json]

Each contestant goes through its own copies of one matrix, together larger than any cache; the
contestants take turns, and the median round counts. The bound is a plain row-by-row product in C
(bench/gemv_bound.c), compiled here for this machine. With one thread the thread's own CPU time is
counted, so that other work on the machine disturbs less; with more, the wall clock.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.kernels import native
from engine.kernels.packed import FORMATS, PackedMatrix

GIB = 2**30
Round = Callable[[], None]  # goes once through all copies


@click.command()
@click.option("--rows", default=5632, show_default=True)
@click.option("--cols", default=2048, show_default=True)
@click.option("--tokens", default="1,4,8,16", show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--working-set", default=1.25, show_default=True, help="GiB of copies, each.")
@click.option("--only", help="Contestants whose name has this in it; the bound runs anyway.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def main(
    rows: int, cols: int, tokens: str, threads: int, rounds: int, working_set: float,
    only: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure every format and torch's own operators."""
    torch.set_num_threads(threads)
    native.set_threads(threads)
    counts = [int(it) for it in tokens.split(",")]
    work = {
        key: (size, run)
        for key, size, run in contestants(rows, cols, counts, int(working_set * GIB))
        if not only or only in key[0] or key[0] == "bound"
    }
    speed = measure(work, rounds, time.thread_time if threads == 1 else time.perf_counter)
    bound = speed[("bound", 1)]
    result = {
        "kernels": native.name(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "bound_gb_s": bound,
        "gb_s": [
            {"what": what, "tokens": count, "gb_s": it, "of_bound": it / bound}
            for (what, count), it in speed.items()
        ],
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table("what", *(f"{count} tokens" for count in counts))
    for what in dict.fromkeys(key[0] for key in speed):
        cells = [speed.get((what, count)) for count in counts]
        table.add_row(what, *(f"{it:.1f}  {it / bound:.2f}x" if it else "" for it in cells))
    console = Console()
    console.print(table)
    console.print(
        f"GB/s of weights and the ratio to the bound; {rows} x {cols}, {threads} threads, "
        f"kernels: {native.name()}, load {os.getloadavg()[0]:.1f}"
    )


def contestants(
    rows: int, cols: int, counts: list[int], working_set: int
) -> Iterator[tuple[tuple[str, int], int, Round]]:
    """Yields (name, tokens), bytes of weights a round, and the round."""
    weight = (torch.randn(rows, cols) * 0.02).bfloat16()
    inputs = {count: torch.randn(count, cols).bfloat16() for count in counts}

    copies = [weight.clone() for _ in range(max(1, working_set // (rows * cols * 2)))]
    size = sum(it.numel() * 2 for it in copies)
    # In huge pages, as the packed weights are; torch's operators have what torch allocates.
    huge = [PackedMatrix.allocate("bf16", rows, cols).data for _ in copies]
    for block in huge:
        block[: rows * cols * 2].copy_(weight.view(torch.uint8).flatten())
    plain = [it[: rows * cols * 2].view(torch.bfloat16).view(rows, cols) for it in huge]
    yield ("bound", 1), size, _bound(plain, inputs[counts[0]])
    yield ("bound, small pages", 1), size, _bound(copies, inputs[counts[0]])
    for count, x in inputs.items():
        yield ("torch F.linear bf16", count), size, _each(torch.nn.functional.linear, x, copies)
    try:
        reordered = [torch.ops.mkldnn._reorder_linear_weight(it) for it in copies]
    except (RuntimeError, AttributeError):
        reordered = []
    for count, x in inputs.items() if reordered else ():
        yield ("torch oneDNN bf16", count), size, _each(_onednn, x, reordered)

    for format in FORMATS:
        packed = PackedMatrix.pack(weight, format)
        amount = max(1, working_set // packed.data.numel())
        many = [PackedMatrix.concatenated([packed]) for _ in range(amount)]
        for count, x in inputs.items():
            yield (format, count), amount * packed.data.numel(), _each(_packed, x, many)


def measure(
    work: dict[tuple[str, int], tuple[int, Round]], rounds: int, clock: Callable[[], float]
) -> dict[tuple[str, int], float]:
    """GB/s of each, the median of so many rounds in turns, after one that does not count."""
    seen: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for number in range(rounds + 1):
        for key, (size, run) in work.items():
            start = clock()
            run()
            if number:
                seen[key].append(size / (clock() - start) / 1e9)
    return {key: statistics.median(it) for key, it in seen.items()}


def _each(multiply: Callable[[Tensor, Any], Tensor], x: Tensor, weights: list[Any]) -> Round:
    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                multiply(x, weight)

    return run


def _packed(x: Tensor, weight: PackedMatrix) -> Tensor:
    return weight.matmul(x)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _bound(copies: list[Tensor], x: Tensor) -> Round:
    rows, cols = copies[0].shape
    gemv = _compiled().gemv_bf16
    y = torch.empty(rows)

    def run() -> None:
        for it in copies:
            addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (it, x, y)]
            gemv(*addresses, ctypes.c_long(rows), ctypes.c_long(cols))

    return run


def _compiled() -> ctypes.CDLL:
    source = Path(__file__).with_name("gemv_bound.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bound.so"
        subprocess.run(
            ["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True
        )
        return ctypes.CDLL(str(library))


if __name__ == "__main__":
    main()
