"""Find out, before a step is recorded on a GPU, whether it can be.

A recording takes no numbers from the host and gives it none. To try is no way to find out: a
recording that breaks off leaves older releases of torch's allocator in a state that can end the
process (pytorch/pytorch#180395). So the calls of a step are watched one by one while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

# What an operator is marked with whose result, or its shape, the host has to wait for.
_WAITS: Final = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class NotRecordable(Exception):
    """A step has something to do with the host."""


def rehearse(compute: Callable[[], Tensor]) -> None:
    """Run a step, and watch it.

    Raises:
        NotRecordable: it asks the device for a number, or brings one there.
    """
    with _as_if_recorded(), _watcher():
        compute()


@contextmanager
def _as_if_recorded() -> Iterator[None]:
    """transformers looks at some numbers, but not where it hears that a stream is recorded."""
    cuda: Any = torch.cuda
    real = cuda.is_current_stream_capturing
    cuda.is_current_stream_capturing = _yes
    try:
        yield
    finally:
        cuda.is_current_stream_capturing = real


def _yes() -> bool:
    return True


def _watcher() -> Any:
    # Only where there is a GPU is there something to watch, so only there it is imported.
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    mode: Any = TorchDispatchMode  # it has no types

    class Watcher(mode):  # type: ignore[misc]
        """Sees every call of an operator."""

        def __torch_dispatch__(
            self, function: Any, _types: Any, args: Any = (), settings: Any = None
        ) -> Any:
            if _waits(function, args):
                raise NotRecordable(f"{function} makes the host wait for the device")
            out = function(*args, **(settings or {}))
            # A single number of the host's goes along with a call, as its argument.
            tensors = [it for it in tree_leaves((args, settings, out)) if isinstance(it, Tensor)]
            devices = {it.device.type for it in tensors if it.ndim}
            is_new = function is torch.ops.aten.lift_fresh.default  # made of the host's numbers
            if len(devices) > 1 or (is_new and out.device.type != "cpu"):
                raise NotRecordable(f"{function} goes between host and device")
            return out

    return Watcher()


def _waits(function: Any, args: Any) -> bool:
    """Whether the host has to wait for an operator's numbers, or for how many there are."""
    if function is torch.ops.aten.index.Tensor:  # counts only what is marked
        return any(it is not None and it.dtype in (torch.bool, torch.uint8) for it in args[1])
    return any(tag in function.tags for tag in _WAITS)
