"""How a section of a checkpoint becomes a stage.

The model is transformers' own class, built on the meta device; of its weights only the section's
are read. Knows in which order that is done, on which device and in which dtype, and how a model is
refused that cannot be cut. Which weight is whose is `engine.weights`', what a loaded stage does
`engine.stage`'s. Knows no architecture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine import attention
from engine.adapter_places import Places
from engine.architecture import DTYPES, Architecture, find_layers, read_architecture
from engine.checkpoint import Checkpoint
from engine.device_fitting import fit_steps, fit_weights
from engine.foreign_code import first_line
from engine.kernels import huge_pages, native
from engine.kernels.packed_bf12 import DoesNotFit
from engine.kv import check_quantization
from engine.lean.fitting import fit_layers
from engine.outline import before_and_after, put_slots, stub_unloaded
from engine.packed_cache import PackedCache
from engine.plan import plan_section
from engine.quantize import PackedParts, Packing, choose_packing, put_packed
from engine.rotary import by_length
from engine.selfcheck import check_stage
from engine.slots import Conductor
from engine.stage import Stage
from engine.staging import Staging
from engine.weights import Wanted, WeightPlan, fill_buffers
from proto.errors import Error, ModelUnfit, UsageError

log = logging.getLogger("comboio.engine")

LoadProgress = Callable[[int, int], None]  # bytes read, bytes to read


def load_stage(
    model: str | None = None,
    *,
    layers: tuple[int, int] | None = None,
    sections: int | None = None,
    index: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: LoadProgress | None = None,
    staging: Staging | None = None,
    quantize: str = "none",
    quantize_head: str = "auto",
    kv_quantize: str = "none",
    cache: PackedCache | None = None,
    compress: str = "off",
    cuda_graphs: bool = True,
) -> Stage:
    """Load one section of a checkpoint, reading only that section's tensors.

    Args:
        model: a folder, a hub id, or None for the demo model.
        layers: the section as [start, end); or else
        sections: how many sections the model is cut into, balanced, and
        index: which of them, counted from 0.
        dtype: "auto" (what the checkpoint stores), "float32", "bfloat16", "float16".
        device: "auto", "cpu", "cuda", "cuda:K".
        threads: torch's threads; None leaves torch's own choice.
        progress: called with (bytes read, bytes to read).
        staging: where the section's bytes are copied to first, to be read from there.
        quantize: "none", "int8", "int4": how weights are rounded, tensor by tensor as they come.
        quantize_head: the same for the lm_head: "auto", "int8", or "same" as the layers.
        kv_quantize: "none", "int8": how keys and values are rounded, as they are written.
        cache: where rounded weights are kept for the next start.
        compress: whether 16 bits are held in 12, exactly: "on", "off", "auto": where it is faster.
        cuda_graphs: whether decode steps are recorded, on a GPU.
    Raises:
        ModelError: no checkpoint there, a damaged one, or one that cannot be split.
        SplitError: no such section.
        UsageError: this model's keys and values cannot be rounded so.
    """
    check_quantization(kv_quantize)
    if threads is not None:
        torch.set_num_threads(threads)
    native.set_threads(torch.get_num_threads())
    checkpoint = Checkpoint(model)
    architecture = read_architecture(checkpoint)
    chosen = choose_dtype(dtype, architecture)
    where = choose_device(device)
    attention.register()
    packing = choose_packing(quantize, quantize_head, chosen, where, compress)
    loader = _Loader(
        checkpoint,
        architecture,
        where,
        packing,
        kv_quantize,
        progress,
        staging,
        cache,
        cuda_graphs,
    )
    asked = (layers, sections, index)
    try:
        return _make_some_stage(loader, chosen, asked)
    except DoesNotFit as exc:
        log.warning("weights are held in 16 bits, since 12 cannot hold them: %s", exc)
        packing = choose_packing(quantize, quantize_head, chosen, where, "off")
    # Out here, where what was packed in vain is in memory no more.
    return _make_some_stage(replace(loader, packing=packing), chosen, asked)


def _make_some_stage(loader: _Loader, dtype: torch.dtype, asked: Asked) -> Stage:
    make = partial(_make_stage, loader, dtype, asked)
    try:
        return make(feeds_token_ids=False)
    except ModelUnfit as unfit:
        # Some models feed every layer from the token ids too; those run with what comes before
        # the first layer loaded at each stage.
        try:
            return make(feeds_token_ids=True)
        except ModelUnfit:
            raise unfit from None


Asked = tuple[tuple[int, int] | None, int | None, int | None]  # layers, sections, index


def _make_stage(
    loader: _Loader,
    dtype: torch.dtype,
    asked: Asked,
    *,
    feeds_token_ids: bool,
) -> Stage:
    huge_pages.new_mapping()  # no stage's memory waits for another's to be let go of
    checkpoint, architecture = loader.checkpoint, loader.architecture
    checkpoint.read_bytes = 0
    model = architecture.build(dtype, attention.ATTENTION_NAME)
    layers, sections, index = asked
    start, end = plan_section(model, architecture, layers=layers, sections=sections, index=index)
    conductor = Conductor(start, end, architecture.num_layers)
    try:
        held, places, packed = loader.section(model, conductor, feeds_token_ids=feeds_token_ids)
        num_by_length = by_length(model)
        fit_weights(model, packed, dtype, loader.device)
        stage = Stage(
            checkpoint=checkpoint,
            architecture=architecture,
            model=model,
            conductor=conductor,
            device=loader.device,
            dtype=dtype,
            stage_bytes=held + packed.packed_bytes,
            places=places,
            packed=packed,
            kv_quantize=loader.kv_quantize,
            feeds_token_ids=feeds_token_ids,
        )
        # In float32 people compare with transformers' own results, to the last bits.
        if dtype != torch.float32 or stage.packing is not None:
            fit_layers(stage)
        check_stage(stage)
        fit_steps(stage, cuda_graphs=loader.cuda_graphs, num_by_length=num_by_length)
    except (Error, DoesNotFit, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # whatever foreign model code raises when it is run in part
        raise ModelUnfit(
            f"{architecture.name} cannot be split into layers {start}:{end}: its layers do not "
            f"run on the hidden states of the layer before alone ({first_line(exc)})"
        ) from exc
    return stage


@dataclass(frozen=True, slots=True)
class _Loader:
    """Whatever the loading of a stage needs to know, and whom it tells."""

    checkpoint: Checkpoint
    architecture: Architecture
    device: torch.device
    packing: Packing | None
    kv_quantize: str
    progress: LoadProgress | None
    staging: Staging | None
    cache: PackedCache | None
    cuda_graphs: bool

    def section(
        self, model: Any, conductor: Conductor, *, feeds_token_ids: bool
    ) -> tuple[int, Places, PackedParts]:
        """Bring the section's weights in and put slots and stand-ins where the rest was.

        Returns:
            Bytes held unpacked, where adapters can be applied, and what is packed.
        """
        path, layers = find_layers(model, self.architecture)
        plan = WeightPlan(model, self.architecture, self.checkpoint)
        before, after = before_and_after(model, path, layers, self.architecture.name)
        own_layers = tuple(f"{path}.{it}." for it in range(conductor.start, conductor.end))
        own_modules = (after if conductor.end == conductor.num_layers else set()) | (
            before if feeds_token_ids else set()
        )

        def is_own(path: str) -> bool:
            return path.startswith(own_layers) or path in own_modules

        def wanted(name: str) -> bool:
            return name.startswith(own_layers) or name.rpartition(".")[0] in own_modules

        plan.check(wanted)
        packed = put_packed(
            model, self.architecture, self.packing, self.device, is_own, plan.dtype_of
        )
        own = {it.removesuffix(".") for it in own_layers} | own_modules
        places = Places(model, self.architecture, path, own=own, before=before)
        held = self._read(plan, wanted, (conductor.start, conductor.end), packed)
        put_slots(model, path, layers, conductor)
        stub_unloaded(model, self.device)
        fill_buffers(model, self.device)
        return held, places, packed

    def _read(
        self, plan: WeightPlan, wanted: Wanted, layers: tuple[int, int], packed: PackedParts
    ) -> int:
        """Fill everything that is wanted, from the cache as far as it has it."""
        shelf = None
        if self.cache is not None and packed.packing is not None and packed.packing.is_lossy:
            shelf = self.cache.shelf(self.checkpoint, plan, packed)
        total = plan.source_bytes(wanted) if self.progress is not None else 0
        done = 0

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if self.progress is not None:
                self.progress(done, max(total, done))

        if shelf is not None:
            total += shelf.num_bytes - shelf.source_bytes
            packed.fetched_bytes = shelf.fetch(count)
        with _at_hand(self.checkpoint, plan.sources(wanted), layers, self.staging):
            held = plan.load(wanted, self.device, count)
        if shelf is not None:
            shelf.store()
        packed.finish()
        return held


def _at_hand(
    checkpoint: Checkpoint, keys: Iterable[str], layers: tuple[int, int], staging: Staging | None
) -> AbstractContextManager[None]:
    """While this is open, the checkpoint's tensors are read from where they are read best."""
    return nullcontext() if staging is None else staging.copy_of(checkpoint, keys, layers)


def choose_dtype(dtype: str, architecture: Architecture) -> torch.dtype:
    """The dtype of weights, KV and hidden states: as asked, or as the checkpoint stores them."""
    if dtype == "auto":
        return architecture.dtype
    try:
        return DTYPES[dtype]
    except KeyError:
        raise UsageError(f"--dtype {dtype!r}: choose auto, {', '.join(DTYPES)}") from None


def choose_device(device: str) -> torch.device:
    """Where the stage runs."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as exc:
        raise UsageError(f"--device {device!r}: choose auto, cpu, cuda or cuda:K") from exc
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device!r}: choose auto, cpu, cuda or cuda:K")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen
