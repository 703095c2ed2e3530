"""A section of a model, loaded and ready to run.

The model is transformers' own class, built on the meta device; of its weights only the section's
are read. It runs on a flat batch of tokens that may belong to many sequences (`StageRun`), with
keys and values in the blocks of a `BlockCache`. Knows no architecture, no socket, no sequence
beyond the step at hand.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine import attention
from engine.adapter_places import Places
from engine.architecture import (
    DTYPES,
    Architecture,
    find_layers,
    first_line,
    read_architecture,
)
from engine.attention import StageRun, StepContext, slots_of
from engine.checkpoint import Checkpoint
from engine.kv import BLOCK_TOKENS, BlockCache, Site, SiteShape, block_bytes, check_table
from engine.lora_layers import Adapter, applied
from engine.masks import MaskNotes, Rule
from engine.outline import before_and_after, put_slots, stub_unloaded
from engine.plan import plan_section
from engine.rotary import by_length
from engine.selfcheck import check_stage
from engine.slots import Conductor, SectionDone
from engine.staging import Staging
from engine.weights import WeightPlan, fill_buffers
from proto.errors import Error, ModelUnfit, UsageError

__all__ = ["BlockCache", "Stage", "StageRun", "load_stage"]

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
        feeds_token_ids: bool = False,
    ) -> None:
        """Take a loaded model over; `load_stage` is the way to make one."""
        self.places = places  # where adapters can be applied
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
        self.feeds_token_ids = feeds_token_ids  # this model's layers see the token ids as well
        self._model, self._conductor = model, conductor
        self._shapes, self._rules = self._learn_attention()
        self.block_bytes = block_bytes(self._shapes, dtype)

    @property
    def is_last(self) -> bool:
        """Whether the final norm and lm_head belong to this stage."""
        return self.end_layer == self.num_layers

    @property
    def attention_calls(self) -> dict[Site, SiteShape]:
        """What each attention call of the section keeps per token."""
        return dict(self._shapes)

    def modules(self) -> Iterator[torch.nn.Module]:
        """Everything that the model consists of here, slots and stand-ins included."""
        modules: Iterator[torch.nn.Module] = self._model.modules()
        return modules

    def new_cache(self, num_blocks: int) -> BlockCache:
        """Make empty KV blocks for one lease: `num_blocks` * `block_bytes` bytes."""
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
        context = StepContext(
            runs=runs,
            cache=cache,
            device=self.device,
            slots=slots_of(runs, self.device),
            rules=self._rules,
        )
        with applied([(run.adapter, run.num_tokens) for run in runs], self.device):
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
    Raises:
        ModelError: no checkpoint there, a damaged one, or one that cannot be split.
        SplitError: no such section.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = Checkpoint(model)
    architecture = read_architecture(checkpoint)
    chosen = choose_dtype(dtype, architecture)
    where = choose_device(device)
    attention.register()
    make = partial(
        _make_stage,
        checkpoint,
        architecture,
        chosen,
        where,
        (layers, sections, index),
        progress,
        staging,
    )
    try:
        return make(feeds_token_ids=False)
    except ModelUnfit as unfit:
        # Some models feed every layer from the token ids too; those run with what comes before
        # the first layer loaded at each stage.
        try:
            return make(feeds_token_ids=True)
        except ModelUnfit:
            raise unfit from None


def _make_stage(
    checkpoint: Checkpoint,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    asked: tuple[tuple[int, int] | None, int | None, int | None],
    progress: LoadProgress | None,
    staging: Staging | None,
    *,
    feeds_token_ids: bool,
) -> Stage:
    checkpoint.read_bytes = 0
    model = architecture.build(dtype, attention.ATTENTION_NAME)
    layers, sections, index = asked
    start, end = plan_section(model, architecture, layers=layers, sections=sections, index=index)
    conductor = Conductor(start, end, architecture.num_layers)
    try:
        held, places = _load_section(
            model, architecture, checkpoint, conductor, device, progress, staging, feeds_token_ids
        )
        by_length(model)
        stage = Stage(
            checkpoint=checkpoint,
            architecture=architecture,
            model=model,
            conductor=conductor,
            device=device,
            dtype=dtype,
            stage_bytes=held,
            places=places,
            feeds_token_ids=feeds_token_ids,
        )
        check_stage(stage)
    except (Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # whatever foreign model code raises when it is run in part
        raise ModelUnfit(
            f"{architecture.name} cannot be split into layers {start}:{end}: its layers do not "
            f"run on the hidden states of the layer before alone ({first_line(exc)})"
        ) from exc
    return stage


def _load_section(
    model: Any,
    architecture: Architecture,
    checkpoint: Checkpoint,
    conductor: Conductor,
    device: torch.device,
    progress: LoadProgress | None,
    staging: Staging | None,
    feeds_token_ids: bool,
) -> tuple[int, Places]:
    """Bring the section's weights in and put slots and stand-ins where the rest was."""
    path, layers = find_layers(model, architecture)
    plan = WeightPlan(model, architecture, checkpoint)
    before, after = before_and_after(model, path, layers, architecture.name)
    own_layers = tuple(f"{path}.{it}." for it in range(conductor.start, conductor.end))
    own_modules = (after if conductor.end == conductor.num_layers else set()) | (
        before if feeds_token_ids else set()
    )

    def wanted(name: str) -> bool:
        return name.startswith(own_layers) or name.rpartition(".")[0] in own_modules

    own = {it.removesuffix(".") for it in own_layers} | own_modules
    places = Places(model, architecture, path, own=own, before=before)
    total = plan.source_bytes(wanted) if progress is not None else 0
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, max(total, done))

    section = (conductor.start, conductor.end)
    with _at_hand(checkpoint, plan.sources(wanted), section, staging):
        held = plan.load(wanted, device, count)
    put_slots(model, path, layers, conductor)
    stub_unloaded(model, device)
    fill_buffers(model, device)
    return held, places


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
