"""Decode steps recorded once and played again: on a GPU, by one call instead of hundreds.

A recording (a CUDA graph) is of one lease's blocks, for so many sequences and so many blocks each:
both are filled up to powers of two. A step's numbers are copied into tensors that stay where they
are, and all the rest happens on the device. Places of a batch that are left over compute the first
sequence once more, which writes the same keys and values to the same slots. Steps that fit no
recording run as they would anyway.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from engine.attention import StageRun
from engine.decode_batch import MOST_BLOCKS, DecodeBatch, filled_tables, table_blocks
from engine.foreign_code import first_line
from engine.kv import BLOCK_TOKENS, BlockCache
from engine.rehearsal import rehearse

if TYPE_CHECKING:
    from engine.stage import Stage

log = logging.getLogger("comboio.engine")

# Records what a function does on the device and returns what does it again, and its result, which
# lies where the next time writes it.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]

MOST_SEQUENCES: Final = 64  # a step of more keeps the device busy without
# Sequences times blocks: beyond, all that is computed takes longer than to ask for it.
MOST_TABLE_BLOCKS: Final = 4096
# How many times the blocks that sequences need by themselves they may be filled up to.
MOST_FILLING: Final = 4
MOST_RECORDINGS: Final = 16  # of one lease; the one that was not used for longest goes
# A recording takes as long as some tens of steps: what came so often is likely to come again.
RECORDED_AFTER: Final = 4
_WARM_UPS: Final = 2  # before a recording, so that libraries have allocated what they keep


@dataclass(frozen=True, slots=True)
class Size:
    """For how much a recording is."""

    sequences: int
    blocks: int

    @classmethod
    def of(cls, runs: Sequence[StageRun]) -> Size | None:
        """The size for a step; None where it is too large, or is no decode step."""
        if not 0 < len(runs) <= MOST_SEQUENCES:
            return None
        if any(run.num_tokens != 1 or run.adapter is not None for run in runs):
            return None
        sequences = 1 << (len(runs) - 1).bit_length()
        widths = [table_blocks(run.start // BLOCK_TOKENS + 1) for run in runs]
        blocks = max(widths)
        most = min(MOST_TABLE_BLOCKS, MOST_FILLING * sum(widths))
        if blocks > MOST_BLOCKS or sequences * blocks > most:
            return None
        return cls(sequences, blocks)


@dataclass(slots=True)
class _OfLease:
    """The recordings for one lease's blocks, and how often each size came before."""

    steps: OrderedDict[Size, StaticStep] = field(default_factory=OrderedDict)
    uses: dict[Size, int] = field(default_factory=dict)


class DecodeGraphs:
    """The recordings of a stage."""

    def __init__(self, stage: Stage, record: Record, recorded_after: int = RECORDED_AFTER) -> None:
        """
        Args:
            record: how to record.
            recorded_after: how many steps of a size run before one is recorded.
        """
        # The stage holds this: were it held in turn, its weights would outlive it for a while.
        self._stage = weakref.ref(stage)
        self._record, self._recorded_after = record, recorded_after
        # They go with the lease's blocks, whose memory they name.
        self._leases: weakref.WeakKeyDictionary[BlockCache, _OfLease] = weakref.WeakKeyDictionary()
        self.why_off: str | None = None  # why nothing is recorded any more

    def forward(
        self, token_ids: Tensor, hidden: Tensor, runs: Sequence[StageRun], cache: BlockCache
    ) -> Tensor | None:
        """As `Stage.forward`; None where the step has to run otherwise."""
        size = None if self.why_off is not None else Size.of(runs)
        if size is None:
            return None
        lease = self._leases.setdefault(cache, _OfLease())
        step = lease.steps.get(size)
        if step is None:
            lease.uses[size] = uses = lease.uses.get(size, 0) + 1
            if uses <= self._recorded_after:
                return None
            stage = self._stage()
            assert stage is not None
            step = StaticStep(stage, size)
            step.fill(token_ids, hidden, runs)
            try:
                step.record(self._record, cache)
            except Exception as exc:  # whatever torch raises where something cannot be recorded
                self.turn_off(first_line(exc))
                return None
            lease.steps[size] = step
            if len(lease.steps) > MOST_RECORDINGS:
                lease.steps.popitem(last=False)
        else:
            step.fill(token_ids, hidden, runs)
        lease.steps.move_to_end(size)
        return step.play(len(runs))

    def count(self, cache: BlockCache) -> int:
        """How many recordings there are for a lease's blocks."""
        lease = self._leases.get(cache)
        return 0 if lease is None else len(lease.steps)

    def turn_off(self, why: str) -> None:
        """Drop all recordings and make no more."""
        self.why_off = why
        self._leases.clear()
        log.warning("decode steps are not recorded as CUDA graphs: %s", why)


class StaticStep:
    """One step's inputs at places that do not change, and its recording."""

    def __init__(self, stage: Stage, size: Size) -> None:
        self._stage, self._size = weakref.ref(stage), size
        # Token id, position and block table of each sequence: one copy a step.
        self._numbers = torch.zeros(
            size.sequences, 2 + size.blocks, dtype=torch.int64, device=stage.device
        )
        self._hidden = torch.zeros(
            size.sequences, stage.hidden_size, dtype=stage.dtype, device=stage.device
        )
        self._play: Callable[[], None] | None = None
        self._result: Tensor | None = None
        # Whatever the recording reads stays, also where a module makes itself another one later.
        self._kept = [it for module in stage.modules() for it in module.buffers(recurse=False)]

    def fill(self, token_ids: Tensor, hidden: Tensor, runs: Sequence[StageRun]) -> None:
        """Put a step's numbers in; places left over get those of the first sequence."""
        numbers = torch.empty(len(runs), 2 + self._size.blocks, dtype=torch.int64)
        numbers[:, 0] = token_ids
        numbers[:, 1] = torch.tensor([run.start for run in runs])
        numbers[:, 2:] = filled_tables(runs, self._size.blocks)
        places = torch.arange(self._size.sequences)
        places[len(runs) :] = 0
        self._numbers.copy_(numbers[places])
        self._hidden.copy_(hidden[places.to(hidden.device)])

    def record(self, record: Record, cache: BlockCache) -> None:
        """Record the step on a lease's blocks; computes it as well, on what was filled in.

        Raises:
            NotRecordable: it cannot be recorded, which was not tried then.
        """
        lease = weakref.ref(cache)  # held by a recording, blocks would outlive their lease

        def compute() -> Tensor:
            held = lease()
            assert held is not None
            return self._compute(held)

        with torch.inference_mode():
            rehearse(compute)
            self._play, self._result = record(compute)

    def play(self, num_sequences: int) -> Tensor:
        """Compute the step that was filled in: (num_sequences, hidden_size), a copy."""
        assert self._play is not None and self._result is not None
        with torch.inference_mode():
            self._play()
            return self._result[:num_sequences].clone()

    def _compute(self, cache: BlockCache) -> Tensor:
        stage, numbers = self._stage(), self._numbers
        assert stage is not None
        batch = DecodeBatch.of_tables(numbers[:, 1].contiguous(), numbers[:, 2:].contiguous())
        return stage.decode(numbers[:, 0].contiguous(), self._hidden, batch, cache)


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs that share their memory, since only one plays at a time."""
    cuda: Any = torch.cuda  # its graphs have no types
    pool: Any = None
    first: Any = None

    def capture(compute: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        graph = cuda.CUDAGraph()
        # Another thread may ask the GPU how much memory is free meanwhile.
        with cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = compute()
        return graph, result

    def record(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool, first
        with cuda.device(device):
            aside = cuda.Stream()
            aside.wait_stream(cuda.current_stream())
            with cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    compute()
            cuda.current_stream().wait_stream(aside)
            if first is None:
                # torch forgets the memory once no graph has it, as between two leases.
                pool = cuda.graph_pool_handle()
                first = capture(lambda: torch.zeros(1, device=device))
            graph, result = capture(compute)
        return graph.replay, result

    return record
