"""Linear modules whose weights are kept packed, and how a parent's siblings share one matrix.

A `PackedLinear` takes the place of a model's own linear module before its weights are read; it is
filled a few rows at a time, so that no more of the source than that is ever in memory beside it.
Siblings that read the same input lie one behind the other in one matrix: whoever knows that can
multiply once. Knows no checkpoint and no architecture; the packed formats are `engine.kernels`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from engine.kernels.packed import STRIP_ROWS, PackedMatrix

PART_BYTES: Final = 32 * 2**20  # of a weight that are in memory at a time, before they are packed

# Siblings that are called with one input, by name as transformers' decoders call them, in the
# order of their rows in the matrix they share.
FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "gate_up": ("gate_proj", "up_proj"),
}


class Packed(nn.Module):
    """A module that packs some of its parameters as they are read."""

    format: str
    packed_leaves: tuple[str, ...]  # names of the parameters that it packs

    def part_length(self, leaf: str) -> int:
        """How many entries of the parameter's first axis it wants at a time."""
        raise NotImplementedError

    def take(self, leaf: str, start: int, part: Tensor) -> None:
        """Pack the entries from `start` on, of the parameter's first axis."""
        raise NotImplementedError

    def lacks(self, leaf: str) -> bool:
        """Whether some of a parameter has not come yet."""
        raise NotImplementedError

    def matrices(self) -> list[PackedMatrix]:
        """Everything that is packed here, always in the same order."""
        raise NotImplementedError

    def all_came(self) -> None:
        """Note that somebody else has filled the matrices."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the weights; nothing can be computed any more."""
        for it in self.matrices():
            it.release()

    @property
    def packed_bytes(self) -> int:
        """Held in memory by the matrices."""
        return sum(it.num_bytes for it in self.matrices())


class PackedLinear(Packed):
    """Multiplies with a packed matrix and adds a bias: what an `nn.Linear` does.

    Also takes the place of transformers' `Conv1D`, whose weight lies the other way round.
    """

    packed_leaves = ("weight",)

    def __init__(self, told: nn.Module, matrix: PackedMatrix, *, is_transposed: bool) -> None:
        """
        Args:
            told: the module whose place it takes; its bias, on the meta device, comes along.
            matrix: (out_features, in_features), not filled yet.
            is_transposed: the weight comes as (in_features, out_features).
        """
        super().__init__()
        self.kind = type(told).__name__
        self.in_features, self.out_features = matrix.cols, matrix.rows
        self.format, self.matrix = matrix.format, matrix
        self.dtype: torch.dtype = told.weight.dtype  # type: ignore[assignment]
        self.bias: nn.Parameter | None
        self.register_parameter("bias", getattr(told, "bias", None))
        self.weight_reads = 0  # how often somebody wanted the weight itself
        self._is_transposed = is_transposed
        self._came = 0  # rows that are filled
        self.train(told.training)

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features) in the model's dtype: unpacked anew each time, so slow."""
        self.weight_reads += 1
        return self.matrix.unpack(self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the weight, unpacked, float32; `start` is a multiple of STRIP_ROWS."""
        end = min(-(-stop // STRIP_ROWS) * STRIP_ROWS, self.out_features)
        return self.matrix.part(start, end).unpack(torch.float32)[: stop - start]

    def forward(self, given: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in the dtype of what is given."""
        return self.matrix.matmul(given, self.bias)

    def part_length(self, leaf: str) -> int:
        """Some rows; the whole where columns come first."""
        if self._is_transposed:
            return self.in_features
        return max(1, PART_BYTES // (self.in_features * 2 * STRIP_ROWS)) * STRIP_ROWS

    def take(self, leaf: str, start: int, part: Tensor) -> None:
        """Pack some rows, or all columns."""
        rows = part.t() if self._is_transposed else part
        self.matrix.part(start, start + len(rows)).fill(rows)
        self._came += len(rows)

    def lacks(self, leaf: str) -> bool:
        """Whether rows are missing."""
        return self._came < self.out_features

    def matrices(self) -> list[PackedMatrix]:
        """The one."""
        return [self.matrix]

    def all_came(self) -> None:
        """Note that the matrix is filled."""
        self._came = self.out_features

    def extra_repr(self) -> str:
        """What printing a model shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


@dataclass(slots=True)
class Fused:
    """Siblings' weights in one matrix, one behind the other."""

    matrix: PackedMatrix
    sizes: tuple[int, ...]  # each sibling's rows
    members: tuple[PackedLinear, ...]
    bias: Tensor | None = None  # of all, once they are loaded

    def join_biases(self) -> None:
        """Put the members' biases into one tensor, of which each then holds its part."""
        biases = [it.bias for it in self.members if it.bias is not None]
        if not biases:
            return
        self.bias = torch.cat([it.detach() for it in biases])
        parts = torch.split(self.bias, list(self.sizes))
        for member, part in zip(self.members, parts, strict=True):
            member.bias = nn.Parameter(part, requires_grad=False)


def fused_of(parent: nn.Module) -> dict[str, Fused]:
    """What of a module's children is in one matrix, by the names in FUSED."""
    found: dict[str, Fused] = parent.__dict__.setdefault("_fused", {})
    return found


def fusable(
    parent: nn.Module, is_packed: Mapping[nn.Module, str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each group of a module's children that may share a matrix: its name in FUSED, and theirs.

    Args:
        is_packed: the modules that will be packed, and in which format.
    """
    for name, names in FUSED.items():
        members: Sequence[Any] = [parent._modules.get(it) for it in names]
        if any(it is None or it not in is_packed for it in members):
            continue
        if not all(isinstance(it, nn.Linear) for it in members):
            continue
        same = {(it.in_features, it.bias is None, is_packed[it]) for it in members}
        if len(same) == 1 and all(it.out_features % STRIP_ROWS == 0 for it in members):
            yield name, names
