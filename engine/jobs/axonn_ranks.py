"""The processes of an AxoNN run, as the training loop asks for them.

Every process learns from rows of its own: gradients of the adapters are added up over all of them,
by AxoNN's own function, and so is the number of learnt tokens that the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from engine.jobs.axonn_library import intra_layer
from engine.jobs.process_group import ProcessGroup


class AxonnRanks(ProcessGroup):
    """All of them; gradients go the library's own way."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Over all processes. The loss is divided by the tokens of all, so this is no mean."""
        intra_layer().sync_gradients(_Holder(parameters), mean=False)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """By AxoNN's own, which would also know parameters that are sharded."""
        norm: Tensor = intra_layer().clip_grad_norm_(parameters, max_norm)
        return norm


@dataclass(frozen=True, slots=True)
class _Holder:
    """What AxoNN asks of a model."""

    held: Sequence[nn.Parameter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """In the same order on every process."""
        return iter(self.held)
