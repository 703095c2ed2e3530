"""A section of a model, ready to run.

It runs on a flat batch of tokens that may belong to many sequences (`StageRun`), with keys and
values in the blocks of a `BlockCache`. Knows no architecture, no socket, no sequence beyond the
step at hand, and not how its weights came here; `engine.stage_loading` does.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine import attention, joined_linear
from engine.adapter_places import Places
from engine.architecture import DTYPES, Architecture
from engine.attention import StageRun, StepContext
from engine.checkpoint import Checkpoint
from engine.decode_batch import DecodeBatch, batch_of
from engine.decode_graphs import DecodeGraphs
from engine.kv import BLOCK_TOKENS, BlockCache, Site, SiteShape, block_bytes, check_table
from engine.lora_layers import Adapter, applied
from engine.masks import MaskNotes, Rule
from engine.quantize import PackedParts, Packing
from engine.slots import Conductor, LayerSlot, SectionDone
from proto.errors import ModelUnfit


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
        """Take a loaded model over; `engine.stage_loading.load_stage` is the way to make one."""
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu {platform.machine()}"
