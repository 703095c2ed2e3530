"""Load AxoNN as it was released, and make its process grid.

The one file that imports AxoNN for the others. torch.distributed is there before AxoNN is asked to
start, so that it takes ranks from there and never touches MPI: importing MPI under a plain srun
ends the process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from engine.jobs.axonn_cpu import gloo_instead_of_nccl, lead_to_cpu
from engine.jobs.axonn_grid import Grid
from proto.errors import UsageError

# Of later ones nobody knows whether their layers take weights, and the CPU mode its places, alike.
TESTED: Final = "0.2.0"


def check_version() -> None:
    """Make sure that it is the release that all of this was tested with.

    Raises:
        UsageError: it is another one, or there is none.
    """
    try:
        found = version("axonn")
    except PackageNotFoundError as exc:
        raise UsageError(
            "manager finetune axonn needs axonn, which is not installed: "
            "pip install 'comboio[axonn]'."
        ) from exc
    if found != TESTED:
        raise UsageError(
            f"axonn {found} is installed, and this command was made for {TESTED}: "
            f"pip install axonn=={TESTED}."
        )


def start_axonn(grid: Grid, device: torch.device) -> None:
    """Make the process groups of a grid; torch.distributed must be initialised.

    Args:
        device: this process's; a CPU leads to the test mode over gloo.
    """
    # AxoNN calls a function of torch's by the name that it had.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor`", FutureWarning)
    with _without_mpi():
        ax: Any = import_module("axonn.axonn")
        import_module("axonn.intra_layer")
    sizes = {
        "G_data": grid.data,
        "G_intra_r": grid.rows,
        "G_intra_c": grid.columns,
        "G_intra_d": grid.depth,
    }
    if device.type == "cuda":
        ax.init(**sizes)
        # AxoNN takes the global rank modulo the GPUs, which is right for blocks of ranks alone.
        torch.cuda.set_device(device)
        return
    lead_to_cpu()
    with gloo_instead_of_nccl():
        ax.init(gpus_per_node=1, **sizes)


def intra_layer() -> Any:
    """AxoNN's layers and what goes with them; after `start_axonn`."""
    return import_module("axonn.intra_layer")


@contextmanager
def _without_mpi() -> Iterator[None]:
    """AxoNN takes mpi4py if it is there, for pipelining alone, which is not done here."""
    name = "mpi4py"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to say "not there"
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
