"""The processes of one run, as torch.distributed knows them.

Whoever started them has initialised the group, or there is one process alone. Everybody calls the
same methods in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn

_THROUGH: Final = "comboio/first-is-through"


class ProcessGroup:
    """All processes of the default group; see `engine.jobs.ranks`."""

    def __init__(self, device: torch.device) -> None:
        """Work on tensors of a device: NCCL wants the GPU's."""
        self._device = device
        self._is_alone = not (distributed.is_available() and distributed.is_initialized())
        self.rank = 0 if self._is_alone else distributed.get_rank()
        self.num_processes = 1 if self._is_alone else distributed.get_world_size()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value added up over all processes."""
        if self._is_alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        return [float(it) for it in total.tolist()]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up each parameter's gradient over all processes, in place."""
        if self._is_alone:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """torch's own: every process has the same gradients."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def barrier(self) -> None:
        """Wait until everybody is here."""
        if not self._is_alone:
            self.sum([0.0])

    def first_says(self, value: float) -> float:
        """What the first process has, for everybody."""
        return self.sum([value if self.rank == 0 else 0.0])[0]

    def agree(self, digest: str) -> bool:
        """Whether all processes have the same text of hexadecimal digits, by its first ones."""
        own = float(int(digest[:12] or "0", 16))  # 48 bits: exact in float64
        return self.first_says(own) == own

    def leave(self) -> None:
        """Give the connections of the training back."""
        if not self._is_alone:
            distributed.destroy_process_group()
            self._is_alone = True

    def wait_for_first(self) -> None:
        """After `leave`: wait until the first process says `first_is_through`, or is gone.

        A launcher that has nothing left to run gives up after some minutes, and with it what
        launchers of other machines hold on to.
        """
        if self.num_processes > 1:
            with suppress(RuntimeError):  # nobody keeps the store any more: nothing to wait for
                _store().wait([_THROUGH], timedelta(days=1))

    def first_is_through(self) -> None:
        """The first process has nothing left to do."""
        if self.num_processes > 1:
            with suppress(RuntimeError):
                _store().set(_THROUGH, "yes")


def _store() -> Any:
    """The one that the launcher keeps, through which the processes met."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torch_distributed: Any = distributed  # exports it without saying so
    return torch_distributed.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1))
