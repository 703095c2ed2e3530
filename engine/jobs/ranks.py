"""Who trains together: one process alone, or several that add up their gradients.

The loop asks these few questions; `engine.jobs.process_group` answers them. Everybody of a run
calls the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class Ranks(Protocol):
    """The processes of one run."""

    @property
    def rank(self) -> int:
        """This process's number, from 0. The first one writes files."""
        ...

    @property
    def num_processes(self) -> int:
        """How many there are."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up each parameter's gradient over all processes, in place."""
        ...

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is `max_norm` at most; returns it as it was."""
        ...

    def barrier(self) -> None:
        """Wait until everybody is here."""
        ...
