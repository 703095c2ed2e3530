"""Keep all that a run needs to go on, and find it again: weights, optimizer, and where it was.

Safetensors and JSON, nothing pickled. The order of the rows, the learning rate and every random
number follow from the seed and the step, so that the step is all that is kept of them. Knows no
loop.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from engine.jobs.folders import sweep, write_folder
from proto.errors import Error

TRAINED: Final = "trained.safetensors"  # the learnt weights, under their names in the model
OPTIMIZER: Final = "optimizer.safetensors"
STATE: Final = "state.json"
_NAME: Final = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run was, beside its weights."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, validation and checkpoints left out
    epoch_seconds: float = 0.0  # of the epoch that is not over
    loss_scale: float | None = None  # of float16
    scale_growth: int | None = None  # steps since it last changed
    validated_step: int | None = None  # the last one after which validation ran


def save_checkpoint(
    folder: Path,
    state: RunState,
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
) -> Path:
    """Write one, whole, then remove the oldest beyond `keep`.

    Raises:
        Error: it cannot be written; those before it are as they were.
    """
    from safetensors.torch import save_file

    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters}
    moments = _flatten(optimizer, parameters)
    path = folder / f"step-{state.step:08d}"

    def fill(partial: Path) -> None:
        save_file(weights, partial / TRAINED)
        save_file(moments, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")

    write_folder(path, fill)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(it[1]), path) for path in folder.iterdir() if (it := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The one to go on with; None if there is none."""
    if folder.is_dir():
        sweep(folder)
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(
    path: Path,
    parameters: Sequence[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | None,
) -> RunState:
    """Put weights and moments back in place.

    Args:
        optimizer: None where only the weights are wanted.
    Raises:
        Error: the checkpoint is damaged, or of another model.
    """
    from safetensors.torch import load_file

    try:
        state = RunState(**json.loads((path / STATE).read_text(encoding="utf-8")))
        weights = load_file(path / TRAINED)
        moments = load_file(path / OPTIMIZER) if optimizer is not None else {}
        if set(weights) != {name for name, _ in parameters}:
            raise ValueError("its weights have other names than this model's")
        with torch.no_grad():
            for name, parameter in parameters:
                parameter.copy_(weights[name])
        if optimizer is not None:
            _restore(optimizer, parameters, moments)
    except Exception as exc:  # a missing file, bad JSON, safetensors' own errors, other shapes
        raise Error(
            f"the checkpoint {path} cannot be used ({exc}): remove it to go on with the one before "
            "it, or pass --overwrite to begin anew"
        ) from exc
    return state


def _flatten(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as `name of weight/name of moment`."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    return found


def _restore(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[tuple[str, nn.Parameter]],
    moments: dict[str, torch.Tensor],
) -> None:
    index_of = {name: index for index, (name, _) in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(index_of[name], {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
