"""Hand a loaded stage's packed matrices over to torch's operators for 8 and 4 bits, on a GPU.

Module by module they are converted and put in the place of what they were, so that no more than
one module's are held twice; the first of each size is tried on random tokens against the weights as
they were. What an operator does not know, refuses or computes otherwise stays packed, and is
widened at each call; the log says so once. Up to how many tokens an operator is the faster way is
measured on the GPU at hand: nothing else tells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear

from engine.experts import PackedExperts
from engine.foreign_code import first_line
from engine.kernels.device_matrix import (
    CHUNK_COLS,
    MOST_TOKENS,
    DeviceMatrix,
    Int4Matrix,
    Int8Matrix,
)
from engine.kernels.device_operators import Operators, Order
from engine.kernels.packed import STRIP_ROWS, PackedMatrix
from engine.lean.agreement import agrees
from engine.packed_linear import PackedLinear
from engine.quantize import PackedParts

log = logging.getLogger("comboio.engine")

Seconds = Callable[[Callable[[], Tensor]], float]  # how long a call takes on the device

# Tokens of a trial: one, and more than an operator takes at a time.
_TRIALS: Final = (1, 17)
# Of a matrix the first and the last rows are compared: all of a large lm_head, in a type that can
# be compared, would take more memory than the stage has beside it.
_TRIED_ROWS: Final = 32 * STRIP_ROWS
_FEWEST_TOKENS: Final = 16


@dataclass(slots=True)
class Handover:
    """What became of a stage's matrices."""

    converted: dict[str, int] = field(default_factory=dict)  # how many, by format
    left: dict[str, str] = field(default_factory=dict)  # why some stay packed, by format
    most_tokens: dict[str, int] = field(default_factory=dict)  # that an operator multiplies


def hand_over(
    parts: PackedParts,
    dtype: torch.dtype,
    device: torch.device,
    operators: Operators,
    seconds: Seconds | None = None,
) -> Handover:
    """Convert what can be converted of a stage's matrices, in their places.

    Args:
        parts: with all weights loaded.
        dtype: of the stage's hidden states.
        operators: that torch has for `device`.
        seconds: measures a call; None leaves every operator its most tokens.
    """
    converter = _Converter(operators, dtype, device)
    for fused in parts.fused:
        found = converter.convert(fused.matrix)
        if found is None:
            continue
        fused.matrix, row = found, 0
        for member in fused.members:
            member.matrix = found.part(row, row + member.out_features)
            row += member.out_features
    for module in parts.modules.values():
        if isinstance(module, PackedExperts):
            module.convert(converter.convert)
        elif isinstance(module, PackedLinear) and not isinstance(module.matrix, DeviceMatrix):
            module.matrix = converter.convert(module.matrix) or module.matrix
    handover = converter.handover
    if seconds is not None:
        for format, largest in converter.largest.items():
            handover.most_tokens[format] = most_tokens(largest, dtype, device, seconds)
        _tell(parts, handover.most_tokens)
    _say(handover)
    return handover


class _Converter:
    """Converts matrices, a size tried before it is believed; remembers what cannot be done."""

    def __init__(self, operators: Operators, dtype: torch.dtype, device: torch.device) -> None:
        self.handover = Handover()
        self.largest: dict[str, DeviceMatrix] = {}
        self._operators, self._dtype, self._device = operators, dtype, device
        self._orders: list[Order] | None = None
        self._tried: set[tuple[str, int, int]] = set()

    def convert(self, packed: PackedMatrix) -> DeviceMatrix | None:
        """The same matrix for the operators; None where there is none, or it does not agree."""
        left = self.handover.left
        # One refusal speaks for all that come after.
        if packed.format in left or packed.format == "bf16":
            return None
        try:
            found = self._converted(packed)
        except Exception as exc:  # whatever torch, or a device that lacks something, raises
            left[packed.format] = first_line(exc)
            return None
        if isinstance(found, str):
            left[packed.format] = found
            return None
        counts = self.handover.converted
        counts[packed.format] = counts.get(packed.format, 0) + 1
        largest = self.largest.get(packed.format)
        if largest is None or found.rows * found.cols > largest.rows * largest.cols:
            self.largest[packed.format] = found
        return found

    def _converted(self, packed: PackedMatrix) -> DeviceMatrix | str:
        if packed.format == "int8":
            found: DeviceMatrix = Int8Matrix.of(packed, self._operators)
        elif packed.format == "int4":
            if self._dtype != torch.bfloat16:
                return f"torch's operator takes bfloat16, this stage has {self._dtype}"
            order = self._order(packed.cols)
            if order is None:
                return "how torch's operator orders the weights is not understood"
            found = Int4Matrix.of(packed, self._operators, order)
        else:
            return "torch has no operator for it"
        # Experts are many, and all alike.
        size = packed.format, packed.rows, packed.cols
        where = None
        if size not in self._tried:
            where = _difference(found, packed, self._dtype, self._device)
            self._tried.add(size)
        return found if where is None else where

    def _order(self, cols: int) -> Order | None:
        """The best order in which a matrix of that width needs no more filling up, if there is."""
        if self._orders is None:
            learnt = [
                Order.learnt(self._operators, it, self._device) for it in self._operators.tiles
            ]
            self._orders = [it for it in learnt if it is not None]
        padded = -(-cols // CHUNK_COLS) * CHUNK_COLS
        whole = [it for it in self._orders if padded % it.tile.cols == 0]
        return next(iter(whole or self._orders), None)


def _difference(
    found: DeviceMatrix, packed: PackedMatrix, dtype: torch.dtype, device: torch.device
) -> str | None:
    """In what a converted matrix computes something else than the packed one; None: in nothing."""
    generator = torch.Generator().manual_seed(found.cols)
    stop = -(-packed.rows // STRIP_ROWS) * STRIP_ROWS
    last = max(0, stop - _TRIED_ROWS)
    pieces = {(0, min(packed.rows, _TRIED_ROWS)), (last, packed.rows)}
    for tokens in _TRIALS:
        x = torch.randn(tokens, packed.cols, generator=generator).to(device, dtype)
        for how, multiply in (("its operator", found.by_operator), ("widened", found.by_product)):
            y = multiply(x)
            for start, end in pieces:
                expected = linear(x, packed.part(start, end).unpack(dtype))
                if not agrees(y[:, start:end].contiguous(), expected):
                    return f"{how} gives other numbers for {packed.rows} x {packed.cols}"
    return None


def most_tokens(
    matrix: DeviceMatrix, dtype: torch.dtype, device: torch.device, seconds: Seconds
) -> int:
    """Up to how many tokens the operator is no slower than widening; 0 where it always is.

    An operator reads the weights once for each few tokens, widening reads and writes them a few
    times for any number: so there is one point from which on widening wins.
    """
    if not matrix.operates_on(dtype):
        return 0
    best, tokens = 0, 1
    while tokens <= MOST_TOKENS:
        x = torch.ones(tokens, matrix.cols, dtype=dtype, device=device)
        by_operator = _measured(partial(matrix.by_operator, x), seconds)
        if by_operator == inf or by_operator > _measured(partial(matrix.by_product, x), seconds):
            break
        best, tokens = tokens, _FEWEST_TOKENS if tokens == 1 else 2 * tokens
    return best


def _measured(call: Callable[[], Tensor], seconds: Seconds) -> float:
    try:
        return seconds(call)
    except RuntimeError:  # such as no memory to widen a large matrix
        return inf


def device_seconds(device: torch.device) -> Seconds:
    """Measures calls on a GPU: the shortest of a few."""

    cuda: Any = torch.cuda  # its events have no types

    def seconds(call: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(5):
            begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(cuda.current_stream(device))
            call()
            end.record(cuda.current_stream(device))
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return min(times)

    return seconds


def _tell(parts: PackedParts, limits: dict[str, int]) -> None:
    """Give every matrix the number that was measured for its format."""
    matrices = [it for module in parts.modules.values() for it in module.matrices()]
    for it in (*matrices, *(fused.matrix for fused in parts.fused)):
        if isinstance(it, DeviceMatrix):
            it.most_tokens = limits[it.format]


def _say(handover: Handover) -> None:
    for format, why in handover.left.items():
        log.warning(
            "%s weights are widened at each call on this device, since torch's operator for them "
            "cannot be used: %s",
            format,
            why,
        )
    for format, count in handover.converted.items():
        most = handover.most_tokens.get(format)
        log.info(
            "%d %s matrices are multiplied by torch's operator%s",
            count,
            format,
            "" if most is None else f", in steps of up to {most} tokens",
        )
