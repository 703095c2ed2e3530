"""A section of a model, loaded and ready to run.

The model is transformers' own class, built on the meta device; of its weights only the section's
are read. It runs on a flat batch of tokens that may belong to many sequences (`StageRun`), with
keys and values in the blocks of a `BlockCache`. Knows no architecture, no socket, no sequence
beyond the step at hand.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine import attention, joined_linear
from engine.adapter_places import Places
from engine.architecture import (
    DTYPES,
    Architecture,
    find_layers,
    read_architecture,
)
from engine.attention import StageRun, StepContext
from engine.checkpoint import Checkpoint
from engine.decode_batch import DecodeBatch, batch_of
from engine.decode_graphs import DecodeGraphs
from engine.device_fitting import fit_steps, fit_weights
from engine.foreign_code import first_line
from engine.kernels import native
from engine.kernels.packed_bf12 import DoesNotFit
from engine.kv import (
    BLOCK_TOKENS,
    BlockCache,
    Site,
    SiteShape,
    block_bytes,
    check_quantization,
    check_table,
)
from engine.lean.fitting import fit_layers
from engine.lora_layers import Adapter, applied
from engine.masks import MaskNotes, Rule
from engine.outline import before_and_after, put_slots, stub_unloaded
from engine.packed_cache import PackedCache
from engine.plan import plan_section
from engine.quantize import PackedParts, Packing, choose_packing, put_packed
from engine.rotary import by_length
from engine.selfcheck import check_stage
from engine.slots import Conductor, LayerSlot, SectionDone
from engine.staging import Staging
from engine.weights import Wanted, WeightPlan, fill_buffers
from proto.errors import Error, ModelUnfit, UsageError

__all__ = ["BlockCache", "Stage", "StageRun", "load_stage"]

log = logging.getLogger("comboio.engine")

LoadProgress = Callable[[int, int], None]  # bytes read, bytes to read


class Stage:
    """Layers [start_layer, end_layer) of one checkpoint, on one device."""

    block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        architecture: Architecture,
        model: Any,
        conductor: Conductor,
        device: torch.device,
        dtype: torch.dtype,
        stage_bytes: int,
        places: Places,
        packed: PackedParts,
        kv_quantize: str = "none",
        feeds_token_ids: bool = False,
    ) -> None:
        """Take a loaded model over; `load_stage` is the way to make one."""
        self.places = places  # where adapters can be applied
        self.packed = packed  # which modules are, and in which format
        self.model_name, self.fingerprint = checkpoint.name, checkpoint.fingerprint
        self.read_bytes, self.stage_bytes = checkpoint.read_bytes, stage_bytes
        self.architecture = architecture.name
        self.start_layer, self.end_layer = conductor.start, conductor.end
        self.num_layers = architecture.num_layers
        self.hidden_size = architecture.hidden_size
        self.vocab_size = architecture.vocab_size
        self.max_context = architecture.max_context
        self.device, self.dtype = device, dtype
        self.dtype_name = next(name for name, it in DTYPES.items() if it == dtype)
        self.device_name = _device_name(device)
        self.kv_quantize = kv_quantize  # "none", or "int8": keys and values in 8 bits
        self.feeds_token_ids = feeds_token_ids  # this model's layers see the token ids as well
        self._model, self._conductor = model, conductor
        # Where calls cost more than what they compute (`engine.device_fitting`):
        self.attends_at_once = False  # from all sequences of a decode step
        self.graphs: DecodeGraphs | None = None  # recorded decode steps
        self._shapes, self._rules = self._learn_attention()
        self.block_bytes = block_bytes(self._shapes, dtype, kv_quantize)

    @property
    def is_last(self) -> bool:
        """Whether the final norm and lm_head belong to this stage."""
        return self.end_layer == self.num_layers

    @property
    def packing(self) -> Packing | None:
        """The formats that matrices are held in; None where all are as torch's own modules are."""
        return self.packed.packing

    @property
    def quantize(self) -> str:
        """ "none", "int8" or "int4"."""
        return self.packing.layers if self.packing is not None and self.packing.is_lossy else "none"

    @property
    def attention_calls(self) -> dict[Site, SiteShape]:
        """What each attention call of the section keeps per token."""
        return dict(self._shapes)

    @property
    def slots(self) -> list[LayerSlot]:
        """The section's layers, in order."""
        return [it for it in self.modules() if isinstance(it, LayerSlot) and it.inner is not None]

    @property
    def plain_layers(self) -> list[int]:
        """Layers that run as transformers wrote them, since no lean form of them is known."""
        return [slot.index for slot in self.slots if slot.lean is None]

    def run_plainly(self) -> None:
        """Run all layers as transformers wrote them."""
        for slot in self.slots:
            slot.lean = None

    def modules(self) -> Iterator[torch.nn.Module]:
        """Everything that the model consists of here, slots and stand-ins included."""
        modules: Iterator[torch.nn.Module] = self._model.modules()
        return modules

    def unload(self) -> None:
        """Free the weights; what is known of the stage stays, and nothing can be computed."""
        self.graphs = None
        joined_linear.release(self.modules())
        for fused in self.packed.fused:
            fused.matrix.release()
        for module in self.packed.modules.values():
            module.release()
        with torch.inference_mode():
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def new_cache(self, num_blocks: int) -> BlockCache:
        """Make empty KV blocks for one lease: `num_blocks` * `block_bytes` bytes."""
        return BlockCache(self._shapes, num_blocks, self.dtype, self.device, self.kv_quantize)

    def exact_cache(self, num_blocks: int) -> BlockCache:
        """The same, of the stage's dtype whatever the leases' are of: for checks of its layers."""
        return BlockCache(self._shapes, num_blocks, self.dtype, self.device)

    def forward(
        self, token_ids: Tensor, hidden: Tensor, runs: Sequence[StageRun], cache: BlockCache
    ) -> Tensor:
        """Run this stage's layers on one micro-batch.

        Args:
            token_ids: (tokens,) int64, all runs' tokens one after the other.
            hidden: (tokens, hidden_size), dtype of the weights, what the stage before gave.
            runs: which sequence each stretch of tokens belongs to, where, and its adapter.
            cache: written in place for these positions.
        Returns:
            (tokens, hidden_size), same dtype, on `self.device`; never an alias of `hidden`.
        Raises:
            RemoteProtocolError: a block table is too short or names blocks not in `cache`;
                nothing was written.
        """
        for run in runs:
            check_table(run.blocks, run.stop, cache.num_blocks)
        if self.graphs is not None:
            played = self.graphs.forward(token_ids, hidden, runs, cache)
            if played is not None:
                return played
        context = StepContext(
            runs=runs,
            cache=cache,
            device=self.device,
            rules=self._rules,
            batch=batch_of(runs, self.device) if self.attends_at_once else None,
            # Adapters are applied to the modules that transformers' layers call.
            plainly=any(run.adapter is not None for run in runs),
        )
        with applied([(run.adapter, run.num_tokens) for run in runs], self.device):
            return self._layers(token_ids, hidden, context)

    def decode(
        self, token_ids: Tensor, hidden: Tensor, batch: DecodeBatch, cache: BlockCache
    ) -> Tensor:
        """`forward` of one token of each sequence, of which only tensors on the device tell.

        Args:
            token_ids: (tokens,) int64, as everything else on `self.device`.
        """
        context = StepContext(
            runs=(),
            cache=cache,
            device=self.device,
            slots=batch.new_slots(),
            rules=self._rules,
            batch=batch,
        )
        return self._layers(token_ids, hidden, context)

    def logits(self, hidden: Tensor, adapters: Sequence[Adapter | None] = ()) -> Tensor:
        """Final norm and lm_head on what `forward` returned.

        Args:
            hidden: (rows, hidden_size) of the tokens that want a next one.
            adapters: of each row's sequence; none of any where it is empty.
        Returns:
            (rows, vocab_size) float32, on `self.device`.
        """
        assert self.is_last, "only the last stage has the lm_head"
        rows = hidden.shape[0]
        self._conductor.tail_pass(hidden.unsqueeze(0))
        runs = [StageRun(start=0, num_tokens=rows, rope_length=rows, blocks=_NO_BLOCKS)]
        context = StepContext(runs=runs, cache=None, device=self.device, slots=_NO_BLOCKS)
        with (
            torch.inference_mode(),
            attention.running(context),
            applied([(adapter, 1) for adapter in adapters], self.device),
        ):
            out = self._call(hidden.unsqueeze(0), torch.zeros_like(hidden[:, 0]).long(), context)
        logits: Tensor = out.logits[0]
        return logits.float()

    def _layers(self, token_ids: Tensor, hidden: Tensor, context: StepContext) -> Tensor:
        embeds = hidden.to(self.device).unsqueeze(0)
        self._conductor.layers_pass(embeds)
        with torch.inference_mode(), attention.running(context):
            try:
                self._call(embeds, token_ids, context)
            except SectionDone:
                pass
        result = self._conductor.result
        assert result is not None, "the section's last layer did not run"
        self._conductor.result = self._conductor.hidden = None
        return result[0]

    def _call(self, embeds: Tensor, token_ids: Tensor, context: StepContext) -> Any:
        if context.batch is not None and context.batch.positions is not None:
            position_ids = context.batch.positions.unsqueeze(0)
        else:
            positions = [torch.arange(run.start, run.stop) for run in context.runs]
            position_ids = torch.cat(positions).to(self.device).unsqueeze(0)
        if self.feeds_token_ids:
            ids = token_ids.to(self.device).unsqueeze(0)
            return self._model(input_ids=ids, position_ids=position_ids, use_cache=False)
        return self._model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False)

    def _learn_attention(self) -> tuple[dict[Site, SiteShape], dict[Site, Rule]]:
        """Run two positions once without a cache: what attention keeps, and what it may see."""
        hidden = torch.zeros(2, self.hidden_size, dtype=self.dtype)
        run = StageRun(start=0, num_tokens=2, rope_length=2, blocks=_NO_BLOCKS)
        context = StepContext(
            runs=[run],
            cache=None,
            device=self.device,
            slots=_NO_BLOCKS,
            notes=MaskNotes(),
        )
        self._layers(torch.zeros(2, dtype=torch.int64), hidden, context)
        silent = [
            layer
            for layer in range(self.start_layer, self.end_layer)
            if (layer, 0) not in context.shapes
        ]
        if silent:
            raise ModelUnfit(
                f"{self.architecture} cannot be split: its layer {silent[0]} does not call "
                "transformers' attention interface (its attention or its state is its own)"
            )
        return context.shapes, context.rules


_NO_BLOCKS = torch.zeros(0, dtype=torch.int64)


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


def _make_stage(
    loader: _Loader,
    dtype: torch.dtype,
    asked: Asked,
    *,
    feeds_token_ids: bool,
) -> Stage:
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu {platform.machine()}"
