"""Who owns which KV block.

Blocks are numbers; the same table goes to every worker, which keeps the bytes. A block is owned
by the sequences that count on it, or cached (nobody owns it, but its content is known by key and
may be shared again), or free. Knows no sequence, no step and no model.

A table of consecutive numbers is read without a gather, so allocation goes for runs: right after
the sequence's last block, else in the largest free run with room to grow, else around the block
that was given up longest ago.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeAlias

# What stands before a block: for the first block of a sequence its salt and rope regime, for any
# other the serial number that the block before it was published under.
Chain: TypeAlias = int | tuple[int | str, bool]


class BlockPool:
    """All blocks of the workers, numbered from 0."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._owners = [0] * num_blocks
        self._free = FreeRuns(num_blocks)
        self._cached: dict[int, None] = {}  # in the order they were given up: oldest first
        # A published block is found by what stands before it and its own tokens. The dictionary
        # compares both for equality after their hashes met, and serials are never used again:
        # two different prefixes cannot be taken for each other.
        self._published: dict[tuple[Chain, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[Chain, tuple[int, ...]]] = {}
        self._serials: dict[int, int] = {}
        self._next_serial = 0

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return self._free.num_free + len(self._cached)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    # --- owning ------------------------------------------------------------------------------

    def allocate(self, count: int, *, after: int | None = None, room: int = 0) -> list[int]:
        """Own `count` blocks (at most `num_available`), consecutive where that can be had.

        Args:
            after: last block of the table that is extended; None starts a new one.
            room: blocks that a new table may grow to, as far as known.
        """
        assert count <= self.num_available, (count, self.num_available)
        blocks = [] if after is None else self._take_upwards(after + 1, count)
        while len(blocks) < count:
            blocks += self._take_elsewhere(count - len(blocks), room)
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Own blocks that were looked up, beside those who own them already."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each; published blocks stay cached until they are needed."""
        # From the end: the cache is emptied oldest first, and a prefix without its continuation
        # is worth more than a continuation without its prefix.
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block in self._keys:
                    self._cached[block] = None
                else:
                    self._free.add(block)

    # --- sharing -----------------------------------------------------------------------------

    def lookup(self, chain: Chain, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """The block that holds `tokens` behind `chain`, and its serial, which is the next chain."""
        block = self._published.get((chain, tokens))
        return None if block is None else (block, self._serials[block])

    def publish(self, block: int, chain: Chain, tokens: tuple[int, ...]) -> int:
        """Let others share this full block; returns the chain behind it.

        When another block is known by the same key already, that one stays the shared one.
        """
        known = self.lookup(chain, tokens)
        if known is not None:
            return known[1]
        key = (chain, tokens)
        self._published[key], self._keys[block] = block, key
        self._serials[block] = self._next_serial
        self._next_serial += 1
        return self._serials[block]

    def serial_of(self, block: int) -> int | None:
        """The serial that the block is published under; None where it is not."""
        return self._serials.get(block)

    def forget(self, block: int) -> None:
        """Nobody may share this block from now on; its owners keep it."""
        key = self._keys.pop(block, None)
        if key is None:
            return
        del self._published[key], self._serials[block]
        if block in self._cached:
            del self._cached[block]
            self._free.add(block)

    # --- finding places ----------------------------------------------------------------------

    def _take_upwards(self, block: int, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            length = self._free.length_from(block)
            if length:
                length = min(length, count - len(taken))
                self._free.remove(block, block, length)
            elif block in self._cached:
                self._evict(block)
                length = 1
            else:
                break
            taken.extend(range(block, block + length))
            block += length
        return taken

    def _take_downwards(self, block: int, count: int) -> list[int]:
        """At most `count` blocks that end right before `block`, in ascending order."""
        first = block
        while block - first < count:
            length = self._free.length_until(first)
            if length:
                taken = min(length, count - (block - first))
                self._free.remove(first - length, first - taken, taken)
                first -= taken
            elif first - 1 in self._cached:
                first -= 1
                self._evict(first)
            else:
                break
        return list(range(first, block))

    def _take_elsewhere(self, count: int, room: int) -> list[int]:
        """At least one block, at most `count`, in one run."""
        start, length = self._free.largest()
        if length >= count or not self._cached:
            return self._take_in_run(start, length, min(count, length), room)
        # Nothing free is long enough. A sequence gives up its whole table at once, from the end:
        # what was given up longest ago ends a table, and what lies before it is about as old.
        coldest = next(iter(self._cached))
        self._evict(coldest)
        run = [*self._take_downwards(coldest, count - 1), coldest]
        return run + self._take_upwards(coldest + 1, count - len(run))

    def _take_in_run(self, start: int, length: int, count: int, room: int) -> list[int]:
        """Part of one free run, placed so that this table and the one before it can grow."""
        first = start
        if start > 0:
            # At the far end if all the room fits there, else in the middle.
            first += max(length - max(room, count), (length - count) // 2)
        self._free.remove(start, first, count)
        return list(range(first, first + count))

    def _evict(self, block: int) -> None:
        del self._cached[block]
        del self._published[self._keys.pop(block)], self._serials[block]

    def check_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Every block is owned exactly as often as `tables` name it, and is nowhere twice."""
        named = Counter(block for table in tables for block in table)
        assert all(self._owners[block] == named[block] for block in range(self.num_blocks))
        free = self._free.blocks()
        assert len(set(free)) == len(free) == self._free.num_free
        assert set(free).isdisjoint(self._cached)
        unowned = {block for block, owners in enumerate(self._owners) if owners == 0}
        assert unowned == set(free) | set(self._cached)
        assert self._keys.keys() == self._serials.keys()
        assert {block: key for key, block in self._published.items()} == self._keys
        assert len(set(self._serials.values())) == len(self._serials)
        assert set(self._cached) <= self._keys.keys()
        assert self._keys.keys().isdisjoint(free)


class FreeRuns:
    """Free blocks as maximal runs of consecutive numbers; every change costs O(log runs)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_free = 0
        self._lengths: dict[int, int] = {}  # by first block
        self._starts: dict[int, int] = {}  # by the block after the last
        # Longest first; entries that no longer match `_lengths` are thrown away when they surface.
        self._by_length: list[tuple[int, int]] = []
        if num_blocks:
            self._insert(0, num_blocks)
            self.num_free = num_blocks

    def length_from(self, block: int) -> int:
        """Length of the run that starts at `block`; 0 if none does."""
        return self._lengths.get(block, 0)

    def length_until(self, block: int) -> int:
        """Length of the run that ends right before `block`; 0 if none does."""
        start = self._starts.get(block)
        return 0 if start is None else block - start

    def largest(self) -> tuple[int, int]:
        """First block and length of a longest run; (0, 0) when nothing is free."""
        while self._by_length:
            negative, start = self._by_length[0]
            if self._lengths.get(start) == -negative:
                return start, -negative
            heapq.heappop(self._by_length)
        return 0, 0

    def add(self, block: int) -> None:
        """Make one block free and merge it with its neighbours."""
        below, above = self.length_until(block), self.length_from(block + 1)
        if below:
            self._delete(block - below)
        if above:
            self._delete(block + 1)
        self._insert(block - below, below + 1 + above)
        self.num_free += 1

    def remove(self, start: int, first: int, count: int) -> None:
        """Take `count` blocks from `first` on out of the run that starts at `start`."""
        end = start + self._delete(start)
        assert start <= first and first + count <= end
        if start < first:
            self._insert(start, first - start)
        if first + count < end:
            self._insert(first + count, end - first - count)
        self.num_free -= count

    def blocks(self) -> list[int]:
        return [
            block
            for start, length in self._lengths.items()
            for block in range(start, start + length)
        ]

    def _insert(self, start: int, length: int) -> None:
        self._lengths[start] = length
        self._starts[start + length] = start
        heapq.heappush(self._by_length, (-length, start))
        if len(self._by_length) > 64 + 4 * len(self._lengths):
            self._by_length = [(-length, start) for start, length in self._lengths.items()]
            heapq.heapify(self._by_length)

    def _delete(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[start + length]
        return length
