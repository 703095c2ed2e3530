"""The processes of one run, as torch.distributed knows them.

Whoever started them has initialised the group, or `open_group` does, or there is one process
alone. Everybody calls the same methods in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import torch
from torch import Tensor, distributed, nn

from engine.jobs.team import Team

# Adapters are hundreds of small matrices, and an exchange takes its time however small it is.
BUCKET_ELEMENTS: Final = 16 * 1024**2
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
        """Add up each parameter's gradient over all processes, in place.

        What only some of them have, as of an expert that no token of the others' rows took, counts
        as 0 there; what nobody has stays None.
        """
        if not self._is_alone:
            for bucket in _buckets(parameters):
                _sum_bucket(bucket)

    def share_weights(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give everybody the first process's."""
        if not self._is_alone:
            with torch.no_grad():
                for parameter in parameters:
                    distributed.broadcast(parameter.data, src=0)

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


@contextmanager
def open_group(team: Team, device: torch.device, *, even_alone: bool = False) -> Iterator[None]:
    """The default group of torch.distributed within the block, over the team's store.

    Args:
        device: this process's; a GPU takes NCCL, a CPU gloo.
        even_alone: also where there is one process.
    """
    if team.num_ranks == 1 and not even_alone:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stores: Any = distributed  # whose names are not all declared
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=stores.PrefixStore("group", team.store),
        rank=team.rank,
        world_size=team.num_ranks,
    )
    yield
    # Not after an error: the others may be in the middle of something, and this one ends anyway.
    distributed.destroy_process_group()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, parts of one dtype that are exchanged at once."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        is_full = sum(it.numel() for it in bucket) + parameter.numel() > BUCKET_ELEMENTS
        if bucket and (is_full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _sum_bucket(parameters: Sequence[nn.Parameter]) -> None:
    first = parameters[0]
    # float32 counts processes exactly; float16 up to 2048 of them.
    has = torch.tensor([it.grad is not None for it in parameters])
    flat = torch.cat(
        [has.to(first)]
        + [
            torch.zeros_like(it).flatten() if it.grad is None else it.grad.flatten()
            for it in parameters
        ]
    )
    distributed.all_reduce(flat)
    has = flat[: len(parameters)] > 0
    at = len(parameters)
    for parameter, somebody_has in zip(parameters, has.tolist(), strict=True):
        if somebody_has:
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def _store() -> Any:
    """The one that the launcher keeps, through which the processes met."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torch_distributed: Any = distributed  # exports it without saying so
    return torch_distributed.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1))
