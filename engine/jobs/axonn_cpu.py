"""Let AxoNN's linear layers run on CPUs over gloo, for tests: its files stay as they are.

AxoNN 0.2.0 knows CUDA and NCCL alone, in a few places that this file names. What runs then is
AxoNN's own grid, sharding, autograd functions and gradient synchronisation. What it cannot show:
NCCL, the placement on GPUs, overlap of communication, speed, memory of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor

LOUD: Final = (
    "TEST MODE: AxoNN on CPUs over gloo. It shows that sharding, losses and gradients are right; "
    "it shows nothing of NCCL, of GPUs, of their memory, or of speed. Real runs need a GPU a rank."
)


@contextmanager
def gloo_instead_of_nccl() -> Iterator[None]:
    """For AxoNN's start: it picks a GPU, and asks for NCCL by name."""
    groups, gpus = cast("Any", dist), cast("Any", torch.cuda)
    new_group, set_device = groups.new_group, gpus.set_device

    def make(ranks: Any = None, *args: Any, backend: str | None = None, **values: Any) -> Any:
        # AxoNN hands over numpy's integers.
        return new_group([int(it) for it in ranks], *args, backend="gloo", **values)

    groups.new_group, gpus.set_device = make, lambda _: None
    try:
        yield
    finally:
        groups.new_group, gpus.set_device = new_group, set_device


def lead_to_cpu() -> None:
    """Lead what AxoNN's linear layers do on "cuda" to the CPU, for the rest of this process."""
    fully_connected: Any = import_module("axonn.intra_layer.fully_connected")
    exchange: Any = import_module("axonn.intra_layer.asym_communication")
    communication: Any = import_module("axonn.intra_layer.communication")
    fully_connected.initialize_params.__wrapped__.__defaults__ = ("cpu",)
    fully_connected.gather_batch_sizes = exchange.gather_batch_sizes = gather_batch_sizes
    exchange.torch = communication.torch = _CpuTorch()
    exchange.dist = _CpuDistributed()


@torch.no_grad()
def gather_batch_sizes(local_batch_size: int, process_group: Any = None) -> Tensor:
    """AxoNN's own sends a tensor without dimensions, which gloo does not take."""
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(sizes, torch.tensor([local_batch_size]), group=process_group)
    return torch.cat(sizes)


def all_to_all(outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Any = None) -> None:
    """gloo's own for lists takes equal shapes alone, the one for a single tensor any."""
    sizes = [it.numel() for it in outputs]
    received = torch.empty(sum(sizes), dtype=outputs[0].dtype)
    dist.all_to_all_single(
        received,
        torch.cat([it.reshape(-1) for it in inputs]),
        sizes,
        [it.numel() for it in inputs],
        group=group,
    )
    for output, part in zip(outputs, torch.split(received, sizes), strict=True):
        output.copy_(part.view_as(output))


class _CpuTorch:
    """`torch` for a module that makes tensors on "cuda"."""

    def __init__(self) -> None:
        self.distributed = _CpuDistributed()
        self.cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, device: Any = None, **values: Any) -> Tensor:
        """On the CPU, wherever it was asked for."""
        return torch.empty(*size, **values)

    def tensor(self, data: Any, device: Any = None, **values: Any) -> Tensor:
        """The same."""
        return torch.tensor(data, **values)


class _CpuDistributed:
    """`torch.distributed`, with an exchange that gloo can do."""

    all_to_all = staticmethod(all_to_all)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


class _CpuCuda:
    """The one thing that is asked of `torch.cuda`."""

    @staticmethod
    def current_device() -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")
