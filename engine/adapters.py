"""Load a stage's own part of an adapter, and see that it works there.

In two halves, since the first takes its time: `read_adapter` waits for a disk and works out what
DoRA needs, and may run on any thread beside steps, as a stage's weights never change;
`check_adapter` runs the stage, so it runs where its steps do. Knows files and modules; which
sequence uses which adapter is said with each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from engine.adapter_files import BIAS, FIRST, MAGNITUDE, SECOND, AdapterFiles, StoredTensor
from engine.adapter_places import Place, Places
from engine.attention import StageRun
from engine.kernels.packed import STRIP_ROWS
from engine.lora_layers import Adapter, LoraLayer, applied
from engine.packed_linear import PackedLinear
from engine.selfcheck import relative_error, tolerance
from engine.slots import LayerSlot
from proto.errors import AdapterError, StepFailed
from proto.free_memory import free_cpu_bytes

if TYPE_CHECKING:
    from engine.stage import Stage

_NUM_TOKENS: Final = 3  # of each of the two sequences that a new adapter is tried on
# DoRA's lengths are worked out over so many weights at a time, 64 MiB of float32.
_MAX_WEIGHTS: Final = 16 * 2**20


def read_adapter(files: AdapterFiles, places: Places, device: torch.device) -> Adapter:
    """Check all of an adapter against the model, and load what belongs to this stage.

    Raises:
        AdapterError: it does not match the model, does not fit into memory, or is damaged; in one
            sentence that names the module, and both shapes where they differ.
    """
    found = places.find({path: _shape(parts) for path, parts in files.modules.items()})
    for trained, path in found.items():
        _check_fit(files, trained, path, places)
    own = {path: trained for trained, path in found.items() if places[path].module is not None}
    _check_memory(files, own)
    return Adapter(
        files.fingerprint,
        {path: _layer(files, trained, places[path], device) for path, trained in own.items()},
    )


def check_adapter(adapter: Adapter, stage: Stage, files: AdapterFiles) -> None:
    """Try an adapter on a few random positions.

    Raises:
        AdapterError: it gives NaN, or cannot be told apart from its neighbours' in a batch.
    """
    if not adapter.layers:
        return
    try:
        _check(stage, adapter, files)
    except StepFailed as exc:
        raise AdapterError(f"{_misfit(files, stage.places)}: {exc}.") from exc


def load_adapter(folder: str, stage: Stage) -> Adapter:
    """Both halves, one after the other.

    Raises:
        AdapterError: as these.
    """
    files = AdapterFiles(folder)
    adapter = read_adapter(files, stage.places, stage.device)
    check_adapter(adapter, stage, files)
    return adapter


# --- does it fit -------------------------------------------------------------------------------


def _shape(parts: Mapping[str, StoredTensor]) -> tuple[int, int]:
    """(in_features, out_features) of the module that was adapted; 0 where a tensor is no matrix."""
    first, second = parts[FIRST].entry.shape, parts[SECOND].entry.shape
    return first[-1] if len(first) == 2 else 0, second[0] if len(second) == 2 else 0


def _check_fit(files: AdapterFiles, trained: str, path: str, places: Places) -> None:
    parts, misfit = files.modules[trained], _misfit(files, places)
    if path not in places:
        kind = places.kind_of(path)
        what = "has no such module" if kind is None else f"has a {kind} there, no linear layer"
        raise AdapterError(f"{misfit}: it adapts {trained}, and the model {what}.")
    place = places[path]
    adapted, own = _shape(parts), (place.in_features, place.out_features)
    if adapted != own:
        raise AdapterError(
            f"{misfit}: it adapts {trained} from {adapted[0]} to {adapted[1]} features, and the "
            f"model's own goes from {own[0]} to {own[1]}; it was trained on another model."
        )
    rank = files.config.rank_of(trained)
    shapes = {
        FIRST: (rank, place.in_features),
        SECOND: (place.out_features, rank),
        BIAS: (place.out_features,),
        MAGNITUDE: (place.out_features,),
    }
    for part, stored in parts.items():
        if stored.entry.shape != shapes[part]:
            raise AdapterError(
                f"{misfit}: tensor {stored.key} has shape {list(stored.entry.shape)}, and "
                f"{list(shapes[part])} follows from the model and from rank {rank} in its config."
            )
        if not stored.entry.dtype.is_floating_point:
            raise AdapterError(f"{misfit}: tensor {stored.key} is of {stored.entry.dtype}.")
    if place.is_before_layers and place.module is None:
        raise AdapterError(
            f"{misfit}: it adapts {trained}, which runs before the first layer, where no worker "
            "computes; train it on the decoder's layers alone."
        )


def _check_memory(files: AdapterFiles, own: Mapping[str, str]) -> None:
    needed = 4 * sum(
        stored.entry.num_bytes // stored.entry.dtype.itemsize
        for trained in own.values()
        for stored in files.modules[trained].values()
    )
    free = free_cpu_bytes()
    if needed > free:
        raise AdapterError(
            f"the adapter {files.folder} takes {needed} bytes of memory for these layers, and "
            f"{free} are free: drop another one, or hold fewer layers."
        )


def _misfit(files: AdapterFiles, places: Places) -> str:
    return f"the adapter {files.folder} does not match {places.model_name}"


# --- its tensors -------------------------------------------------------------------------------


def _layer(files: AdapterFiles, trained: str, place: Place, device: torch.device) -> LoraLayer:
    assert place.module is not None
    parts = {part: _read(files, it, device) for part, it in files.modules[trained].items()}
    scaling = files.config.scaling_of(trained)
    stretch = parts.get(MAGNITUDE)
    if stretch is not None:
        stretch = stretch / _row_lengths(place, parts[FIRST], parts[SECOND] * scaling)
    return LoraLayer(
        module=place.module,
        first=parts[FIRST],
        second=parts[SECOND],
        scaling=scaling,
        bias=parts.get(BIAS),
        stretch=stretch,
    )


def _read(files: AdapterFiles, stored: StoredTensor, device: torch.device) -> Tensor:
    # In float32 as peft holds them, whatever the model's own type.
    tensor = files.read(stored).float()
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(
            f"{files.folder}: tensor {stored.key} holds NaN or infinity: its training failed."
        )
    return tensor.to(device)


def _row_lengths(place: Place, first: Tensor, second: Tensor) -> Tensor:
    """The length of each row of weights with the product of the matrices added."""
    step = max(1, _MAX_WEIGHTS // (place.in_features * STRIP_ROWS)) * STRIP_ROWS
    return torch.cat(
        [
            (_rows(place, at, at + step) + second[at : at + step] @ first).norm(dim=1)
            for at in range(0, place.out_features, step)
        ]
    )


def _rows(place: Place, start: int, stop: int) -> Tensor:
    """Some rows of a module's weight, as (out, in) in float32; fewer at its end."""
    module: Any = place.module
    stop = min(stop, place.out_features)
    if isinstance(module, PackedLinear):
        return module.rows(start, stop)
    weight: Tensor = module.weight.detach()
    rows = weight.t() if place.is_transposed else weight
    return rows[start:stop].float()


# --- does it work ------------------------------------------------------------------------------


def _check(stage: Stage, adapter: Adapter, files: AdapterFiles) -> None:
    """One sequence with the adapter and one without, together and each alone."""
    misfit = _misfit(files, stage.places)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, _NUM_TOKENS, stage.hidden_size), generator=generator).to(stage.dtype)
    ids = torch.randint(stage.vocab_size, (2, _NUM_TOKENS), generator=generator)
    _check_entry(stage, adapter, ids[0], misfit)
    cache = stage.exact_cache(2)

    def run(number: int, with_adapter: bool) -> StageRun:
        return StageRun(
            start=0,
            num_tokens=_NUM_TOKENS,
            rope_length=_NUM_TOKENS,
            blocks=torch.tensor([number]),
            adapter=adapter if with_adapter else None,
        )

    alone = torch.cat([stage.forward(ids[n], hidden[n], [run(n, n == 1)], cache) for n in range(2)])
    together = stage.forward(
        ids.flatten(), hidden.flatten(0, 1), [run(0, False), run(1, True)], cache
    )
    pairs = [(alone, together)]
    if stage.is_last:
        rows: list[Adapter | None] = [None] * _NUM_TOKENS + [adapter] * _NUM_TOKENS
        parts = [
            stage.logits(alone[at : at + _NUM_TOKENS], rows[at : at + _NUM_TOKENS])
            for at in (0, _NUM_TOKENS)
        ]
        pairs.append((torch.cat(parts), stage.logits(alone, rows)))
    for expected, result in pairs:
        if not bool(torch.isfinite(expected).all()):
            raise AdapterError(f"{misfit}: with it the layers give NaN on random input.")
        if relative_error(result, expected) > tolerance(stage):
            raise AdapterError(
                f"{misfit}: beside a sequence without it, both come out otherwise than alone."
            )


def _check_entry(stage: Stage, adapter: Adapter, token_ids: Tensor, misfit: str) -> None:
    """See that what enters the first layer, which the manager computes, stays the same.

    Only in models whose layers are fed from the token ids as well can an adapter be applied to
    something before them.
    """
    path = next((it for it in adapter.layers if stage.places[it].is_before_layers), None)
    if path is None:
        return
    slot = next(it for it in stage.modules() if isinstance(it, LayerSlot) and it.index == 0)
    entered: list[Tensor] = []
    hook = slot.register_forward_pre_hook(lambda _, given: entered.append(given[0].clone()))
    run = StageRun(
        start=0,
        num_tokens=len(token_ids),
        rope_length=len(token_ids),
        blocks=torch.tensor([0]),
    )
    hidden = torch.zeros(len(token_ids), stage.hidden_size, dtype=stage.dtype)
    try:
        stage.forward(token_ids, hidden, [run], stage.exact_cache(1))
        with applied([(adapter, len(token_ids))], stage.device):
            stage.forward(token_ids, hidden, [run], stage.exact_cache(1))
    finally:
        hook.remove()
    if not torch.equal(*entered):
        raise AdapterError(
            f"{misfit}: it adapts {path}, on which depends what the manager gives to the first "
            "layer; train it on the decoder's layers alone."
        )
