"""Weights of linear layers in the layout that the kernels read, in 16, 12, 8 or 4 bits.

The layout (linear.h) is one for all processors, so packed bytes can be kept on a disk. int8 has one
scale for each row, int4 one for each 32 columns of a row, both symmetric; bf12 is bf16, exactly, in
12 bits. The compiled kernels round what they multiply with: to bfloat16, where the processor
multiplies that, or to 8 bits with a scale for each 64 values, for int8 and int4. Without the
kernels, and on other devices, torch widens the weights each time. Knows no model and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.kernels import huge_pages, native, packed_bf12, packed_torch
from engine.kernels.native import DTYPES
from engine.kernels.packed_bf12 import DoesNotFit

FORMATS: Final = ("bf16", "int8", "int4", "bf12")
STRIP_ROWS: Final = 16
# Changes whenever the same weights would be packed into other bytes.
LAYOUT_VERSION: Final = 1

_CHUNK_COLS: Final = {"bf16": 32, "int8": 64, "int4": 64, "bf12": 32}
_CHUNK_BYTES: Final = {"bf16": 1024, "int8": 1024, "int4": 576}
_HEAD_BYTES: Final = {"bf16": 0, "int8": 64, "int4": 0}


def strip_bytes(format: str, cols: int) -> int:
    """What 16 rows of a packed matrix take."""
    chunks = -(-cols // _CHUNK_COLS[format])
    if format == "bf12":
        return packed_bf12.strip_bytes(chunks)
    return _HEAD_BYTES[format] + chunks * _CHUNK_BYTES[format]


class PackedMatrix:
    """(rows, cols) weights, packed; multiplies from the right: y = x W^T."""

    __slots__ = ("_call", "cols", "data", "format", "rows")

    def __init__(self, format: str, rows: int, cols: int, data: Tensor) -> None:
        """
        Args:
            format: "bf16", "bf12", "int8" or "int4".
            data: the packed bytes, uint8, contiguous, `num_bytes_of` long; used, not copied.
        """
        if data.numel() != self.num_bytes_of(format, rows, cols) or not data.is_contiguous():
            raise ValueError(
                f"a packed {format} matrix of {rows} x {cols} takes "
                f"{self.num_bytes_of(format, rows, cols)} contiguous bytes, not {data.numel()}"
            )
        self.format, self.rows, self.cols, self.data = format, rows, cols, data
        # What every call of the kernel begins with.
        self._call: tuple[int, ...] = (FORMATS.index(format), rows, cols, data.data_ptr())

    @staticmethod
    def num_bytes_of(format: str, rows: int, cols: int) -> int:
        """What a packed matrix of that size takes."""
        return -(-rows // STRIP_ROWS) * strip_bytes(format, cols)

    @property
    def num_bytes(self) -> int:
        """Held in memory."""
        return self.data.numel()

    def release(self) -> None:
        """Let go of the bytes, which parts may still hold; nothing can be computed any more."""
        self.data, self._call = torch.empty(0, dtype=torch.uint8), ()

    @classmethod
    def allocate(
        cls, format: str, rows: int, cols: int, device: torch.device | str = "cpu"
    ) -> PackedMatrix:
        """An unfilled matrix; `fill` or `part(...).fill` fill it."""
        size = cls.num_bytes_of(format, rows, cols)
        if torch.device(device).type == "cpu":
            return cls(format, rows, cols, huge_pages.memory(size))
        return cls(format, rows, cols, torch.empty(size, dtype=torch.uint8, device=device))

    @classmethod
    def pack(cls, weight: Tensor, format: str) -> PackedMatrix:
        """Pack (rows, cols) of bfloat16, float16 or float32, of any strides."""
        packed = cls.allocate(format, weight.shape[0], weight.shape[1], weight.device)
        packed.fill(weight)
        return packed

    @classmethod
    def concatenated(cls, parts: Sequence[PackedMatrix]) -> PackedMatrix:
        """One matrix of the rows of all, a copy; all but the last have whole strips of 16 rows."""
        first = parts[0]
        if any(it.rows % STRIP_ROWS for it in parts[:-1]):
            raise ValueError("only matrices of whole strips of 16 rows can follow each other")
        if any((it.format, it.cols) != (first.format, first.cols) for it in parts):
            raise ValueError("matrices of one format and width can follow each other, no others")
        whole = cls.allocate(
            first.format, sum(it.rows for it in parts), first.cols, first.data.device
        )
        torch.cat([it.data for it in parts], out=whole.data)
        return whole

    def part(self, row_start: int, row_stop: int) -> PackedMatrix:
        """Rows [row_start, row_stop) of the same memory; both whole strips, or the end."""
        ends = row_stop == self.rows or row_stop % STRIP_ROWS == 0
        if row_start % STRIP_ROWS or not ends or not 0 <= row_start < row_stop <= self.rows:
            raise ValueError(
                f"rows {row_start} to {row_stop} are no part of {self.rows} packed rows: "
                "parts begin and end at multiples of 16"
            )
        size = strip_bytes(self.format, self.cols)
        begin, end = row_start // STRIP_ROWS * size, -(-row_stop // STRIP_ROWS) * size
        return PackedMatrix(self.format, row_stop - row_start, self.cols, self.data[begin:end])

    def fill(self, weight: Tensor) -> None:
        """Pack (rows, cols) of bfloat16, float16 or float32, of any strides, into this matrix."""
        if weight.shape != (self.rows, self.cols):
            raise ValueError(f"{tuple(weight.shape)} is not {self.rows} x {self.cols}")
        if weight.dtype not in DTYPES:
            weight = weight.float()
        library = native.library
        if library is None or not weight.is_cpu or not self.data.is_cpu:
            packed_torch.pack(weight, self.format, self.data)
            return
        fits = library.pack(
            *self._call, weight.data_ptr(), DTYPES[weight.dtype], *weight.stride()
        )  # fmt: skip
        if not fits:
            raise DoesNotFit(f"too many high bytes for {self}")

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(rows, cols) that the packed weights stand for, a copy."""
        library = native.library
        if library is None or not self.data.is_cpu:
            return packed_torch.unpack(self.data, self.format, self.rows, self.cols, dtype)
        out = torch.empty(self.rows, self.cols, dtype=dtype)
        library.unpack(*self._call, out.data_ptr(), DTYPES[dtype], self.cols, 1)
        return out

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x W^T + bias + residual.

        Args:
            x: (..., cols), bfloat16, float16 or float32.
            bias: (rows,), contiguous, of one of these dtypes, or None.
            residual: (..., rows), of one of these dtypes, or None; may be `out`.
            out: (..., rows), contiguous, written and returned; may be of another dtype than x.
        Returns:
            (..., rows), dtype of x.
        """
        library = native.library
        if library is None or not x.is_cpu:
            return self._matmul_by_torch(x, bias, residual, out)
        if not x.is_contiguous():
            x = x.contiguous()
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.rows))
        if residual is not None and not residual.is_contiguous():
            residual = residual.contiguous()
        cols = self.cols
        library.linear(
            *self._call, x.numel() // cols, x.data_ptr(), DTYPES[x.dtype], cols,
            out.data_ptr(), DTYPES[out.dtype], self.rows,
            0 if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else DTYPES[residual.dtype], self.rows,
        )  # fmt: skip
        return out

    def _matmul_by_torch(
        self, x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None
    ) -> Tensor:
        y = linear(x, self.unpack(x.dtype), None if bias is None else bias.to(x.dtype))
        if residual is not None:
            y = y.to(residual.dtype) + residual
        return y if out is None else out.copy_(y)

    def __repr__(self) -> str:
        return f"PackedMatrix({self.format}, {self.rows} x {self.cols})"
