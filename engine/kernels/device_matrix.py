"""Packed matrices in the layouts of torch's own operators for 8 and 4 bits, on a GPU.

A `PackedMatrix` is taken apart into whole numbers and scales, which the operators then have in an
order of their own. The numbers stay the same ones: int4 is (n - 8) * scale with a scale for each 32
columns here and there, int8 has a scale for each row. Operators multiply a few tokens well; for
many tokens the weights are widened once and multiplied as usual. Which operators to use is said by
the caller; knows no module.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from engine.kernels import packed_torch
from engine.kernels.device_operators import Operators, Order, packed_by
from engine.kernels.packed import PackedMatrix

GROUP_COLS: Final = 32  # that share a scale in int4
CHUNK_COLS: Final = 64  # that packed matrices are filled up to multiples of
_ZERO: Final = 8  # what stands for 0 in int4
# Of whole numbers, a byte each, that are rearranged at a time: a board's GPU has no room for more.
_AT_ONCE_BYTES: Final = 64 * 2**20
# More tokens than this are not tried: by then every operator known is slower than a product.
MOST_TOKENS: Final = 1024


class DeviceMatrix(PackedMatrix):
    """(rows, cols) weights as an operator has them; multiplies from the right: y = x W^T."""

    __slots__ = ("most_tokens",)

    def __init__(self, format: str, rows: int, cols: int, most_tokens: int) -> None:
        """
        Args:
            most_tokens: that the operator multiplies; more go the other way.
        """
        self.format, self.rows, self.cols = format, rows, cols
        self.most_tokens = most_tokens

    def by_operator(self, x: Tensor) -> Tensor:
        """(tokens, cols) to (tokens, rows), of x's type, which the operator must know."""
        raise NotImplementedError

    def by_product(self, x: Tensor) -> Tensor:
        """The same by widening the weights first; x of any type."""
        raise NotImplementedError

    def operates_on(self, dtype: torch.dtype) -> bool:
        """Whether the operator takes tokens of this type."""
        return True

    def release(self) -> None:
        """Let go of the weights."""
        self.data = self.data.new_empty(0)

    def fill(self, weight: Tensor) -> None:
        """Refused: what was taken apart is not packed again."""
        raise ValueError(f"{self} is in its last form and takes no other weights")

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `PackedMatrix.matmul` does."""
        tokens = x.reshape(-1, self.cols)
        if len(tokens) <= self.most_tokens and self.operates_on(x.dtype):
            y = self.by_operator(tokens)
        else:
            y = self.by_product(tokens)
        y = y.reshape(*x.shape[:-1], self.rows)
        if bias is not None:
            y = y + bias.to(y.dtype)
        if residual is not None:
            y = y.to(residual.dtype) + residual
        return y if out is None else out.copy_(y)

    def __repr__(self) -> str:
        return f"DeviceMatrix({self.format}, {self.rows} x {self.cols})"


class ScaledMatrix(DeviceMatrix):
    """Whole numbers and their scales, as one of the operators has them."""

    __slots__ = ("_operators", "_scales")

    def __init__(
        self,
        format: str,
        operators: Operators,
        rows: int,
        cols: int,
        data: Tensor,
        scales: Tensor,
        most_tokens: int,
    ) -> None:
        super().__init__(format, rows, cols, most_tokens)
        self._operators, self.data, self._scales = operators, data, scales

    @property
    def num_bytes(self) -> int:
        """Held in memory."""
        return self.data.nbytes + self._scales.nbytes

    def release(self) -> None:
        """Let go of the weights and scales."""
        super().release()
        self._scales = self._scales.new_empty(0)


class Int8Matrix(ScaledMatrix):
    """A byte a weight, row by row, and a scale for each row."""

    __slots__ = ()

    def __init__(
        self,
        operators: Operators,
        rows: int,
        cols: int,
        data: Tensor,
        scales: Tensor,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        """
        Args:
            data: int8, contiguous, `rows` and `cols` or more, filled up with zeros.
            scales: float32, one for each row of `data`.
        """
        super().__init__("int8", operators, rows, cols, data, scales, most_tokens)

    @classmethod
    def of(cls, packed: PackedMatrix, operators: Operators) -> Int8Matrix:
        """The same weights; beside `packed`, not in its place."""
        strips = packed.data.view(-(-packed.rows // 16), -1)
        whole, scales = packed_torch.int8_parts(strips)
        data = whole.contiguous().bitwise_xor_(128).view(torch.int8)  # number - 128
        return cls(operators, packed.rows, packed.cols, data, scales)

    def part(self, row_start: int, row_stop: int) -> PackedMatrix:
        """Rows [row_start, row_stop) of the same memory."""
        end = len(self.data) if row_stop == self.rows else row_stop
        return Int8Matrix(
            self._operators,
            row_stop - row_start,
            self.cols,
            self.data[row_start:end],
            self._scales[row_start:end],
            self.most_tokens,
        )

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(rows, cols) that the weights stand for, a copy."""
        values = self.data[: self.rows, : self.cols].float() * self._scales[: self.rows, None]
        return values.to(dtype)

    def by_operator(self, x: Tensor) -> Tensor:
        """By torch's operator for weights of 8 bits."""
        given = pad(x, (0, self.data.shape[1] - self.cols)).contiguous()
        scales = self._scales
        if self._operators.scales_like_tokens:
            scales = scales.to(x.dtype)
        return self._operators.matmul_int8(given, self.data, scales)[:, : self.rows]

    def by_product(self, x: Tensor) -> Tensor:
        """Scaled behind the product, as 8 bits are exact in every type: fewer passes over all."""
        if x.dtype == torch.float16:  # too narrow for sums that are not scaled yet
            return linear(x, self.unpack(x.dtype))
        y = linear(x, self.data[: self.rows, : self.cols].to(x.dtype))
        return (y * self._scales[: self.rows]).to(x.dtype)


class Int4Matrix(ScaledMatrix):
    """Four bits a weight in an operator's order, a scale and a zero for each 32 columns of a row.

    The zero is always 0, but the operator reads one: 5 bits a weight, where packed ones have 4.5.
    """

    __slots__ = ("_order",)

    def __init__(
        self,
        operators: Operators,
        order: Order,
        rows: int,
        cols: int,
        data: Tensor,
        scales: Tensor,
        most_tokens: int = MOST_TOKENS,
    ) -> None:
        """
        Args:
            data: what the operator made of the numbers, in whole tiles.
            scales: (groups, rows in whole tiles, 2) bfloat16, scale and zero.
        """
        super().__init__("int4", operators, rows, cols, data, scales, most_tokens)
        self._order = order

    @classmethod
    def of(cls, packed: PackedMatrix, operators: Operators, order: Order) -> Int4Matrix:
        """The same weights; beside `packed`, not in its place."""
        tile = order.tile
        strips = packed.data.view(-(-packed.rows // 16), -1)
        # A multiple of every tile's rows at a time.
        at_once = max(1, _AT_ONCE_BYTES // (packed.cols * 64)) * 4
        parts, scales = [], []
        for start in range(0, len(strips), at_once):
            whole, some = packed_torch.int4_parts(strips[start : start + at_once])
            missing = -len(whole) % tile.rows, -whole.shape[1] % tile.cols
            whole = pad(whole, (0, missing[1], 0, missing[0]), value=_ZERO)
            some = pad(some, (0, missing[1] // GROUP_COLS, 0, missing[0]))
            parts.append(packed_by(operators, whole, tile))
            scales.append(some)
        both = torch.cat(scales).t().unsqueeze(2)
        both = torch.cat([both, torch.zeros_like(both)], dim=2).contiguous()
        return cls(operators, order, packed.rows, packed.cols, torch.cat(parts), both)

    def part(self, row_start: int, row_stop: int) -> PackedMatrix:
        """Rows [row_start, row_stop) of the same memory."""
        tile_rows, all_rows = self._order.tile.rows, self._scales.shape[1]
        end = all_rows if row_stop == self.rows else row_stop
        if row_start % tile_rows or end % tile_rows:
            return RowsOf(self, row_start, row_stop)
        each = all_rows // len(self.data)  # rows in one entry of the operator's first axis
        return Int4Matrix(
            self._operators,
            self._order,
            row_stop - row_start,
            self.cols,
            self.data[row_start // each : end // each],
            self._scales[:, row_start:end],
            self.most_tokens,
        )

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """(rows, cols) that the weights stand for, a copy."""
        rows = self._scales.shape[1]
        # A product of 4 and of 8 bits is rounded once in bfloat16 too; any other type takes more.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        whole = self._order.rows_of(self.data, rows, exact).view(rows, -1, GROUP_COLS)
        scales = self._scales[:, :, 0].t().to(exact)
        values = (whole - _ZERO) * scales[:, : whole.shape[1], None]
        return values.flatten(1)[: self.rows, : self.cols].to(dtype)

    def operates_on(self, dtype: torch.dtype) -> bool:
        """Only bfloat16."""
        return dtype == torch.bfloat16

    def by_operator(self, x: Tensor) -> Tensor:
        """By torch's operator for weights of 4 bits."""
        given = pad(x, (0, len(self._scales) * GROUP_COLS - self.cols)).contiguous()
        # Of a part the scales have others between them, which the operator does not take.
        scales = self._scales.contiguous()
        return self._operators.matmul_int4(given, self.data, GROUP_COLS, scales)[:, : self.rows]

    def by_product(self, x: Tensor) -> Tensor:
        """Widened to x's type."""
        return linear(x, self.unpack(x.dtype))


class RowsOf(DeviceMatrix):
    """Some rows of a matrix that cannot be cut there: the whole is multiplied."""

    __slots__ = ("_start", "_whole")

    def __init__(self, whole: DeviceMatrix, start: int, stop: int) -> None:
        super().__init__(whole.format, stop - start, whole.cols, whole.most_tokens)
        self._whole, self._start, self.data = whole, start, whole.data[:0]

    @property
    def num_bytes(self) -> int:
        """None of its own."""
        return 0

    def part(self, row_start: int, row_stop: int) -> PackedMatrix:
        """Rows of the same matrix."""
        return RowsOf(self._whole, self._start + row_start, self._start + row_stop)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """These rows alone, a copy."""
        return self._whole.unpack(dtype)[self._start : self._start + self.rows].contiguous()

    def operates_on(self, dtype: torch.dtype) -> bool:
        """As the whole."""
        return self._whole.operates_on(dtype)

    def release(self) -> None:
        """Let go of the whole's weights."""
        self._whole.release()

    def by_operator(self, x: Tensor) -> Tensor:
        """All rows by the operator, of which some are kept."""
        return self._whole.by_operator(x)[:, self._start : self._start + self.rows]

    def by_product(self, x: Tensor) -> Tensor:
        """All rows widened."""
        return self._whole.by_product(x)[:, self._start : self._start + self.rows]
