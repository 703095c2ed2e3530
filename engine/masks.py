"""Learn, from the masks that a model makes, which positions each of its attention calls sees.

Neither a config nor the arguments of an attention call say it reliably; the mask that the model
hands to a layer does. In a stage's first pass the mask function is asked about some far positions,
and a marker goes to the layer in the mask's place; where the marker arrives, that rule holds from
then on. In all other passes no mask is made. Knows three rules: all earlier positions, a sliding
window, chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MaskFunction = Callable[[int, int, Tensor, Tensor], Tensor]  # batch, head, queries, keys


@dataclass(frozen=True, slots=True)
class Rule:
    """Which positions a token sees, itself included."""

    kind: str = "full"  # or "sliding": the last `window`; "chunked": those of its own chunk
    window: int = 0

    def first_visible(self, position: int) -> int:
        """The earliest position that a token at `position` sees."""
        if self.kind == "sliding":
            return max(0, position - self.window + 1)
        if self.kind == "chunked":
            return position // self.window * self.window
        return 0

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Boolean: whether tokens at the positions `queries` see those at `keys` (broadcast)."""
        visible = keys <= queries
        if self.kind == "sliding":
            visible &= keys > queries - self.window
        elif self.kind == "chunked":
            visible &= keys >= queries // self.window * self.window
        return visible


FULL: Final = Rule()


class MaskNotes:
    """The rules behind the masks of one pass."""

    def __init__(self) -> None:
        # By address; kept alive, so that no address is used twice.
        self._markers: dict[int, tuple[Tensor, Rule | None]] = {}

    def marker(
        self, mask_function: MaskFunction, window: int | None, shape: tuple[int, ...]
    ) -> Tensor:
        """Stand-in for the mask (batch, 1, queries, keys) that `mask_function` describes."""
        rule = _rule_behind(mask_function, window)
        marker = torch.ones(shape, dtype=torch.bool).tril()
        self._markers[marker.data_ptr()] = (marker, rule)
        return marker

    def rule(self, mask: Tensor) -> Rule | None:
        """What was noted for a marker, or for a slice of it from its beginning.

        None for a mask that follows no rule known here, or was not made by the mask function.
        """
        _, rule = self._markers.get(mask.data_ptr(), (None, None))
        return rule


def _rule_behind(mask_function: MaskFunction, window: int | None) -> Rule | None:
    """Find the rule that agrees with the function at the positions where rules differ, if any."""
    step = window or 64
    near = [base * step + offset for base in range(4) for offset in range(-2, 3)]
    positions = torch.tensor([it for it in near if it >= 0])
    queries, keys = positions[:, None], positions[None, :]
    said = mask_function(0, 0, queries, keys)
    rules = [FULL] if not window else [FULL, Rule("sliding", window), Rule("chunked", window)]
    for rule in rules:
        if torch.equal(said.expand(len(positions), len(positions)), rule.visible(queries, keys)):
            return rule
    return None  # a model may make masks that no layer of it uses
