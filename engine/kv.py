"""Hold the keys and values of one lease, in blocks of fixed size.

Knows tensors and block ids only; how 8 bits hold a number stands in `engine.kv_quantize`. Which
sequence owns which block is decided in the manager (`engine.blocks`); here a block table is taken
at its word after its bounds are checked.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from engine.kv_quantize import SCALE_DTYPE, quantized, widened
from proto.errors import RemoteProtocolError, UsageError

if TYPE_CHECKING:
    from engine.attention import Told

# Tokens per block. Small enough that a short sequence wastes little and that prefixes are shared
# finely, large enough that a table of 16k tokens is 1024 entries (4 KiB beside each step).
BLOCK_TOKENS: Final = 16

QUANTIZATIONS: Final = ("none", "int8")

# From here on a tensor has pages of its own; what is smaller is written in no time.
LARGE_BYTES: Final = 2**20

# Of one sequence's keys and values in 8 bits so many become wide at once, where torch attends: some
# heads of a long text. A GPU has the room, and wants large operations.
WIDENED_BYTES: Final = 8 * 2**20
GPU_WIDENED_BYTES: Final = 256 * 2**20

# Where one attention call reads and writes: (global layer index, how many calls came before it
# within that layer). Almost every architecture calls attention once a layer.
Site = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SiteShape:
    """What one attention call keeps per token."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def values_per_token(self) -> int:
        """Numbers kept per token: keys and values of all heads."""
        return self.num_heads * (self.key_size + self.value_size)

    def bytes_per_token(self, dtype: torch.dtype, quantize: str = "none") -> int:
        """What these take, with the scales of keys and values where they are in 8 bits."""
        if quantize == "none":
            return self.values_per_token * dtype.itemsize
        return self.values_per_token + 2 * self.num_heads * SCALE_DTYPE.itemsize


class BlockCache:
    """Keys and values of every attention call of one stage, for the sequences of one lease.

    All is zero at first, as memory may come from a lease of somebody else, whose keys nobody else
    is to attend to.
    """

    def __init__(
        self,
        shapes: dict[Site, SiteShape],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        quantize: str = "none",
    ) -> None:
        """Make `num_blocks` empty blocks.

        Args:
            shapes: what each attention call keeps per token.
            dtype: of what is written and read.
            quantize: "none": it is held as it is; "int8": in 8 bits.
        """
        self.num_blocks, self.dtype = num_blocks, dtype
        self.told: dict[Site, Told] = {}  # of `engine.attention`: it names this memory
        self._keys: dict[Site, _Rows] = {}
        self._values: dict[Site, _Rows] = {}
        rows = _PlainRows if quantize == "none" else _Int8Rows
        for site, shape in shapes.items():
            heads = shape.num_heads
            self._keys[site] = rows(num_blocks, heads, shape.key_size, dtype, device)
            self._values[site] = rows(num_blocks, heads, shape.value_size, dtype, device)

    def tensors(self, site: Site) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, (slots, heads, size) each, contiguous; int8 in 8 bits."""
        return self._keys[site].numbers, self._values[site].numbers

    def scales(self, site: Site) -> tuple[Tensor, Tensor] | None:
        """Of the keys and values of all slots in 8 bits, (blocks, heads, BLOCK_TOKENS) bfloat16."""
        keys, values = self._keys[site].scales, self._values[site].scales
        return None if keys is None or values is None else (keys, values)

    def write(self, site: Site, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the (tokens, heads, size) `keys` and `values` into the token slots (tokens,)."""
        self._keys[site].write(slots, keys)
        self._values[site].write(slots, values)

    def num_heads(self, site: Site) -> int:
        """Of its keys and values."""
        return self._keys[site].numbers.shape[1]

    def parts(self, site: Site, span: KvSpan) -> list[tuple[int, int]]:
        """Which heads of a sequence to read together, such that few of them are widened at once."""
        heads, (keys, values) = self.num_heads(site), self.tensors(site)
        if self.scales(site) is None:
            return [(0, heads)]
        numbers = (keys.shape[2] + values.shape[2]) * (span.stop - span.start)
        room = WIDENED_BYTES if keys.device.type == "cpu" else GPU_WIDENED_BYTES
        together = max(1, min(heads, room // (numbers * self.dtype.itemsize)))
        return [(low, min(low + together, heads)) for low in range(0, heads, together)]

    def read(self, site: Site, span: KvSpan, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The (tokens, heads, size) keys and values of one sequence; a view where it can be."""
        return self._keys[site].read(span, heads), self._values[site].read(span, heads)


class _PlainRows:
    """Keys or values of all slots as they were given."""

    scales = None

    def __init__(
        self, num_blocks: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.numbers = _zeros((num_blocks * BLOCK_TOKENS, heads, size), dtype, device)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        self.numbers.index_copy_(0, slots, rows)

    def read(self, span: KvSpan, heads: slice) -> Tensor:
        numbers = self.numbers[:, heads]
        if span.rows is None:
            return numbers[span.start : span.stop]
        return numbers.index_select(0, span.rows)


class _Int8Rows:
    """Keys or values of all slots in 8 bits.

    A block's scales lie [head][token], as the kernels want them: those of 16 tokens' one head.
    """

    def __init__(
        self, num_blocks: int, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._dtype = dtype
        self.numbers = _zeros((num_blocks * BLOCK_TOKENS, heads, size), torch.int8, device)
        self.scales = _zeros((num_blocks, heads, BLOCK_TOKENS), SCALE_DTYPE, device)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        numbers, scales = quantized(rows)
        self.numbers.index_copy_(0, slots, numbers)
        self.scales[slots // BLOCK_TOKENS, :, slots % BLOCK_TOKENS] = scales

    def read(self, span: KvSpan, heads: slice) -> Tensor:
        numbers, scales = self.numbers[:, heads], self.scales[:, heads]
        if span.rows is not None:
            chosen = scales[span.rows // BLOCK_TOKENS, :, span.rows % BLOCK_TOKENS]
            return widened(numbers.index_select(0, span.rows), chosen, self._dtype)
        first = span.start // BLOCK_TOKENS
        blocks = scales[first : -(-span.stop // BLOCK_TOKENS)]
        chosen = blocks.transpose(1, 2).flatten(0, 1)  # (tokens, heads)
        before = first * BLOCK_TOKENS
        return widened(
            numbers[span.start : span.stop].contiguous(),  # torch widens nothing else fast
            chosen[span.start - before : span.stop - before],
            self._dtype,
        )


_Rows = _PlainRows | _Int8Rows


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU these are pages that nobody has written: the system hands them out as blocks fill.

    `torch.zeros` would write all of them at once.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < LARGE_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True)
class KvSpan:
    """The token slots of one sequence, from its first position that is read to its last.

    A table of consecutive blocks is a plain slice [start, stop), read without a copy; any other
    names every slot in `rows`.
    """

    start: int
    stop: int
    rows: Tensor | None


def token_slots(blocks: Tensor, first: int, stop: int) -> Tensor:
    """The slots (stop - first,) int64 of positions [first, stop) under a block table."""
    positions = torch.arange(first, stop)
    return blocks[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS


def span_of(blocks: Tensor, first: int, stop: int, device: torch.device) -> KvSpan:
    """The span of positions [first, stop) under a block table (num_blocks,) int64."""
    low, high = first // BLOCK_TOKENS, (stop - 1) // BLOCK_TOKENS
    base = int(blocks[low])
    if high == low or bool((blocks[low + 1 : high + 1] - blocks[low:high] == 1).all()):
        offset = (base - low) * BLOCK_TOKENS
        return KvSpan(first + offset, stop + offset, None)
    return KvSpan(0, stop - first, token_slots(blocks, first, stop).to(device))


def check_table(blocks: Tensor, stop: int, num_blocks: int) -> None:
    """Refuse a block table that is too short for `stop` tokens or names blocks not leased.

    Raises:
        RemoteProtocolError: the table comes from the wire, so this is the peer's mistake.
    """
    if stop > len(blocks) * BLOCK_TOKENS:
        raise RemoteProtocolError(
            f"a block table of {len(blocks)} blocks of {BLOCK_TOKENS} tokens cannot hold {stop}"
        )
    if len(blocks) and (int(blocks.min()) < 0 or int(blocks.max()) >= num_blocks):
        raise RemoteProtocolError(
            f"a block table names blocks {int(blocks.min())} to {int(blocks.max())}, "
            f"the lease has {num_blocks}"
        )


def block_bytes(shapes: dict[Site, SiteShape], dtype: torch.dtype, quantize: str = "none") -> int:
    """Bytes of one block over all attention calls of a stage."""
    per_token = sum(shape.bytes_per_token(dtype, quantize) for shape in shapes.values())
    return per_token * BLOCK_TOKENS


def check_quantization(quantize: str) -> None:
    """Refuse what keys and values cannot be held in.

    Raises:
        UsageError: there is no such way.
    """
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"--kv-quantize {quantize}: it must be one of {', '.join(QUANTIZATIONS)}.")
