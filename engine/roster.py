"""Who runs, who waits, and what each holds: KV blocks, state slots, a place in the batch.

Sequences are served in the order in which they came. When room is short the youngest running one
gives up what it holds and waits again at its old place; its KV is computed anew later, from the
prompt and what it has generated. A sequence of which something is in flight is never chosen for
that. Knows nothing of steps; `engine.batching` composes them from what runs.

Why blocks and slots of a sequence can be given to another one at once, even while a step that
uses them is in flight: every stage computes steps in the order in which they were issued, and a
block is written by a step before anything of that step or a later one reads it at those places.
Whatever the new owner does comes in a later step, so at each stage the old step has read and
written before the new one writes. What the old step still writes is overwritten before it is read.
The same order makes a block shareable as soon as the step that fills it is issued, though not
within that step itself, where a stage may compute the runs in any order.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.blocks import BlockPool, Chain
from engine.requests import Request


@dataclass(slots=True, eq=False)
class Sequence:
    """One request and how far it is; changed by the roster, the batcher and the scheduler only."""

    request: Request
    arrival: int
    tokens: list[int]  # prompt and generated
    # Rotary tables that depend on the length are those of max(rope_base, position + 1). It stays
    # over replays, so that they give the same KV, and changes only where the regime does.
    rope_base: int
    blocks: list[int] = field(default_factory=list)
    state_slot: int | None = None
    running: bool = False
    # Grows whenever the sequence loses its KV: what is in flight of an earlier life does not count.
    life: int = 0
    prefill_end: int = 0  # tokens it had when its prefill began
    issued: int = 0  # positions below this were handed to a step
    returned: int = 0  # and these have come back
    in_flight: int = 0  # runs of this life
    chain: Chain = 0  # of its last published block
    num_published: int = 0  # blocks at the start of its table that were looked up or published
    scored: int = 0  # rows from the start whose scores have come back, in whatever life

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def score_end(self) -> int:
        """Rows below this tell how likely a token of the prompt is, where that is asked."""
        return len(self.request.prompt) - 1 if self.request.scores_prompt else 0

    @property
    def is_prefilling(self) -> bool:
        return self.issued < self.prefill_end

    @property
    def can_decode(self) -> bool:
        """Its newest token has come back and was not fed yet."""
        return self.running and self.prefill_end <= self.issued < len(self.tokens)

    def __lt__(self, other: Sequence) -> bool:
        return self.arrival < other.arrival


class Roster:
    """All live sequences."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        num_state_slots: int,
        max_context: int,
        rope_switch: int | None,
        share_prefixes: bool,
    ) -> None:
        self.pool = pool
        self.running: list[Sequence] = []  # oldest first
        self.num_waiting = 0
        self.preemptions = 0
        self.shared_tokens = 0
        self._waiting: list[Sequence] = []  # a heap; who left while waiting stays until on top
        self._left: set[Sequence] = set()  # those
        self._max_running = max_running
        self._has_slots = num_state_slots > 0
        self._free_slots = list(range(num_state_slots))
        self._max_context = max_context
        self._rope_switch = rope_switch
        self._share_prefixes = share_prefixes
        self._fresh: set[int] = set()  # blocks that the step being composed fills
        self._no_room: tuple[int, int, int] | None = None

    def waiting(self) -> Iterator[Sequence]:
        """Who waits, in no particular order."""
        return (sequence for sequence in self._waiting if sequence not in self._left)

    def next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0] in self._left:
            self._left.discard(heapq.heappop(self._waiting))
        return self._waiting[0] if self._waiting else None

    # --- coming and going --------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, sequence)
        self.num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """It is over; what it holds is free at once."""
        if sequence.running:
            self._let_go(sequence)
        else:
            self._left.add(sequence)
            self.num_waiting -= 1

    def send_back(self, sequence: Sequence) -> None:
        """From running to waiting, without its KV."""
        self._let_go(sequence)
        self.add(sequence)

    def replace_pool(self, pool: BlockPool) -> None:
        """All KV is gone; everybody waits for the new pool."""
        for sequence in tuple(self.running):
            self.send_back(sequence)
        self.pool = pool
        self._fresh.clear()
        self._no_room = None

    def admit(self, sequence: Sequence) -> bool:
        """Let the next waiting one run, with blocks for all its tokens; False: not now.

        One that is older than some that run (it was restarted) sends those back for its place.
        """
        overtaken = bool(self.running) and sequence < self.running[-1]
        situation = (sequence.arrival, self.pool.num_available, len(self.running))
        if self._no_room == situation:
            return False
        while True:
            shared, chain = self._lookup(sequence)
            if not self._fresh.isdisjoint(shared):
                return False  # the next step can share what this one computes
            if self._has_room(sequence, shared):
                break
            if not self._preempt_for(sequence):
                # A newcomer is asked again when something changed; this one at every return.
                self._no_room = None if overtaken else situation
                return False
        self._start(sequence, shared, chain)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence a block for its next position if it needs one; False: not now.

        The oldest gets it as soon as the youngest is home. The youngest keeps what it holds and
        waits until an older one ends, or takes it all.
        """
        held = len(sequence.blocks)
        if held * self.pool.block_tokens > sequence.issued:
            return True
        if self.pool.num_available == 0 and not self._preempt_for(sequence):
            return False
        room = self._final_blocks(sequence) - held
        sequence.blocks += self.pool.allocate(1, after=sequence.blocks[-1], room=room)
        return True

    # --- sharing -----------------------------------------------------------------------------

    def publish(self, sequence: Sequence) -> tuple[tuple[int, int], ...]:
        """Let others share the blocks that were filled; returns (block, serial) of the new ones."""
        if not self._share_prefixes:
            return ()
        size = self.pool.block_tokens
        published = []
        for index in range(sequence.num_published, sequence.issued // size):
            tokens = tuple(sequence.tokens[index * size : (index + 1) * size])
            block = sequence.blocks[index]
            sequence.chain = self.pool.publish(block, sequence.chain, tokens)
            if self.pool.serial_of(block) == sequence.chain:
                self._fresh.add(block)
                published.append((block, sequence.chain))
            sequence.num_published = index + 1
        return tuple(published)

    def step_composed(self) -> None:
        """What was published so far is there for the steps that follow."""
        self._fresh.clear()

    def forget_blocks_of(self, sequence: Sequence) -> None:
        """What it computed, or was computed from, cannot be trusted: nobody new may share it."""
        for block in sequence.blocks:
            self.pool.forget(block)

    def _lookup(self, sequence: Sequence) -> tuple[list[int], Chain]:
        """The longest known prefix that leaves to compute what is to be scored, and one token."""
        switched = self._rope_switch is not None and sequence.rope_base > self._rope_switch
        chain: Chain = (sequence.request.prompt_salt, switched)
        blocks: list[int] = []
        size = self.pool.block_tokens
        most = len(sequence.tokens) - 1
        if sequence.scored < sequence.score_end:
            most = sequence.scored  # a shared block has the keys and values of a row, not its score
        for start in range(0, most - size + 1, size):
            found = self.pool.lookup(chain, tuple(sequence.tokens[start : start + size]))
            if found is None:
                break
            block, chain = found
            blocks.append(block)
        return blocks, chain

    # --- room --------------------------------------------------------------------------------

    def _has_room(self, sequence: Sequence, shared: list[int]) -> bool:
        if len(self.running) >= self._max_running or (self._has_slots and not self._free_slots):
            return False
        wanted = self.pool.blocks_for(len(sequence.tokens)) - len(shared)
        left = self.pool.num_available - sum(map(self.pool.is_cached, shared)) - wanted
        # Older ones that will grow keep a block each, else they would soon send it back again.
        return left >= 0 and left >= sum(
            len(older.blocks) < self._final_blocks(older)
            for older in self.running
            if older < sequence
        )

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Send the youngest running one back, if it is younger and nothing of it is in flight."""
        # Never the second youngest instead: it would come before the youngest again, and then
        # both have to be computed anew. The youngest is home within a round.
        youngest = self.running[-1] if self.running else sequence
        if not sequence < youngest or youngest.in_flight:
            return False
        self.send_back(youngest)
        self.preemptions += 1
        return True

    def _final_blocks(self, sequence: Sequence) -> int:
        """Blocks it will own if it generates all it may; its last token is never fed."""
        request = sequence.request
        tokens = min(len(request.prompt) + request.max_new_tokens, self._max_context) - 1
        return min(self.pool.blocks_for(tokens), self.pool.num_blocks)

    def _start(self, sequence: Sequence, shared: list[int], chain: Chain) -> None:
        heapq.heappop(self._waiting)
        self.num_waiting -= 1
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(
            self.pool.blocks_for(len(sequence.tokens)) - len(shared),
            after=shared[-1] if shared else None,
            room=self._final_blocks(sequence) - len(shared),
        )
        sequence.chain, sequence.num_published = chain, len(shared)
        sequence.issued = sequence.returned = len(shared) * self.pool.block_tokens
        sequence.prefill_end = len(sequence.tokens)
        sequence.state_slot = self._free_slots.pop() if self._has_slots else None
        sequence.running = True
        self.shared_tokens += sequence.issued
        insort(self.running, sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        if sequence.state_slot is not None:
            self._free_slots.append(sequence.state_slot)
        sequence.blocks, sequence.state_slot, sequence.running = [], None, False
        sequence.issued = sequence.returned = sequence.prefill_end = sequence.in_flight = 0
        sequence.life += 1

    def check_invariants(self) -> None:
        """What holds between any two events."""
        self.pool.check_invariants([sequence.blocks for sequence in self.running])
        assert not self._fresh
        waiting = list(self.waiting())
        assert len(waiting) == self.num_waiting
        assert len({id(sequence) for sequence in waiting + self.running}) == (
            len(waiting) + len(self.running)
        )
        assert self.running == sorted(self.running) and len(self.running) <= self._max_running
        slots = [sequence.state_slot for sequence in self.running]
        assert all((slot is not None) == self._has_slots for slot in slots)
        assert not self._has_slots or len(set(slots) | set(self._free_slots)) == (
            len(slots) + len(self._free_slots)
        )
        for sequence in waiting:
            assert not (sequence.running or sequence.blocks or sequence.in_flight)
        for sequence in self.running:
            held = len(sequence.blocks) * self.pool.block_tokens
            assert sequence.running and len(set(sequence.blocks)) == len(sequence.blocks)
            assert sequence.returned <= sequence.issued <= min(held, len(sequence.tokens))
            assert sequence.num_published <= sequence.issued // self.pool.block_tokens
            assert held - self.pool.block_tokens < max(sequence.issued, sequence.prefill_end)
