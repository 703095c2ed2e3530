"""Stored tensors that together make one, and how a layout finds them in a checkpoint.

Knows headers, and how to complain of them; reads no tensor. Which tensors belong together, and what
is made of them, is said by the layouts: `engine.stored_integers`, `engine.stored_scaled` and
`engine.stored_compressed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.json_file import shown
from proto.errors import ModelError

Parts = Mapping[str, Tensor]  # the stored tensors that make one, by what they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Stored tensors that make one."""

    shape: tuple[int, ...]
    parts: dict[str, str]  # what it is -> its key
    # Those whose first axis is the made one's: some entries of it are enough.
    by_entry: frozenset[str] = frozenset()
    # Makes entries [start, stop) of the first axis, float32; of `by_entry` it gets only these.
    make: Callable[[Parts, int, int], Tensor]


class Finder:
    """One checkpoint's tensors, and how to complain of them."""

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any]) -> None:
        self.checkpoint, self.config = checkpoint, config

    def ending(self, suffix: str) -> Iterator[tuple[str, str]]:
        """(what stands before the suffix, key) of every tensor with that ending."""
        for key in self.checkpoint:
            if key.endswith(suffix):
                yield key.removesuffix(suffix), key

    def parts(self, base: str, **names: str) -> dict[str, str]:
        """The tensors of a group that are there, by what they are."""
        found = {what: base + name for what, name in names.items()}
        return {what: key for what, key in found.items() if key in self.checkpoint}

    def require_kind(self, key: str, *kinds: torch.dtype) -> None:
        """Refuse the checkpoint unless a tensor is of one of these types; of any float if none."""
        dtype = self.checkpoint.announced(key).dtype
        if not (dtype in kinds if kinds else dtype.is_floating_point):
            raise self.misfit(f"{key} of {dtype}", self.checkpoint.announced(key).shape)

    def group_size(self, asked: object, key: str, in_features: int, num_groups: int) -> int:
        """How many inputs share a scale, of which there are so many."""
        if type(asked) is int and asked > 0 and -(-in_features // asked) == num_groups:
            return asked
        if in_features % num_groups:  # then nobody can tell
            raise self.misfit(key, self.checkpoint.announced(key).shape)
        return in_features // num_groups

    def rows_of_groups(
        self, order: Tensor | None, in_features: int, num_groups: int, size: int
    ) -> Tensor:
        """(in_features,): the group of each input, as listed or one after the other."""
        if order is None:
            return torch.arange(in_features) // size
        groups = order.long()
        lowest, highest = int(groups.min()), int(groups.max())
        if lowest == highest == -1:  # how compressed-tensors says that nothing was reordered
            return torch.arange(in_features) // size
        if lowest < 0 or highest >= num_groups:
            raise ModelError(
                f"{self.checkpoint.name} ({self.config['quant_method']}): inputs of a weight are "
                f"put into groups {lowest} to {highest}, and it has groups 0 to {num_groups - 1}: "
                "fetch the checkpoint again"
            )
        return groups

    def shape(self, key: str, num_axes: int) -> tuple[int, ...]:
        """Of a tensor with so many axes."""
        shape = self.checkpoint.announced(key).shape
        if len(shape) != num_axes or 0 in shape:
            raise self.misfit(key, shape)
        return shape

    def require(self, is_right: bool, key: str) -> None:
        """Refuse the checkpoint unless a tensor is as the others want it."""
        if not is_right:
            raise self.misfit(key, self.checkpoint.announced(key).shape)

    def misfit(self, key: str, shape: tuple[int, ...]) -> ModelError:
        """What to say of a tensor that is not as the others want it."""
        return ModelError(
            f"{self.checkpoint.name}: tensor {key} of shape {list(shape)} does not fit the others "
            f"of its weight ({self.config['quant_method']}): fetch the checkpoint again"
        )

    def unknown(self, what: str) -> ModelError:
        """What to say of a layout that is known, stored in a way that is not."""
        return unknown_layout(self.checkpoint, f"{self.config['quant_method']}, {what}")


def unknown_layout(checkpoint: Checkpoint, method: str) -> ModelError:
    """What to say of a checkpoint that is stored in a way that is not known here."""
    return ModelError(
        f"{checkpoint.name} is stored quantized ({method}), which cannot be loaded: take the "
        "checkpoint it was made from, and quantize here with --quantize"
    )


def plain(said: object) -> str:
    """A value of the config, as it reads best in a sentence."""
    return said if isinstance(said, str) and said.replace("-", "_").isidentifier() else shown(said)
