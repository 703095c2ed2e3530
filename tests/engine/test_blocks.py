"""Blocks are owned, shared, cached and handed out in runs."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from engine.blocks import BlockPool, Chain

ROOT: Chain = (0, False)


def publish_all(pool: BlockPool, table: list[int], first_token: int = 0) -> None:
    """Publish a table's blocks as one prefix of consecutive token numbers."""
    chain = ROOT
    for index, block in enumerate(table):
        chain = pool.publish(block, chain, tokens_at(pool, index, first_token))


def tokens_at(pool: BlockPool, index: int, first_token: int = 0) -> tuple[int, ...]:
    start = first_token + index * pool.block_tokens
    return tuple(range(start, start + pool.block_tokens))


def look_up(pool: BlockPool, count: int, first_token: int = 0) -> list[int]:
    """The blocks of a prefix as far as they are known."""
    chain, found = ROOT, []
    for index in range(count):
        hit = pool.lookup(chain, tokens_at(pool, index, first_token))
        if hit is None:
            break
        block, chain = hit
        found.append(block)
    return found


def test_a_new_table_is_a_run_of_consecutive_blocks() -> None:
    assert BlockPool(8, 4).allocate(3) == [0, 1, 2]


def test_a_table_grows_right_behind_its_last_block() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(3)
    assert pool.allocate(2, after=table[-1]) == [3, 4]


def test_a_second_table_leaves_the_first_one_room_to_grow() -> None:
    pool = BlockPool(100, 4)
    first = pool.allocate(3)
    second = pool.allocate(3, room=10)
    assert second == [90, 91, 92]
    assert pool.allocate(7, after=second[-1]) == list(range(93, 100))
    assert pool.allocate(87, after=first[-1]) == list(range(3, 90))


def test_a_table_with_more_room_wanted_than_there_is_starts_in_the_middle() -> None:
    pool = BlockPool(101, 4)
    pool.allocate(1)
    assert pool.allocate(2, room=1000) == [50, 51]


def test_a_table_that_cannot_grow_in_place_goes_on_where_there_is_room() -> None:
    pool = BlockPool(6, 4)
    table = pool.allocate(2)
    blocker = pool.allocate(1, after=1)
    assert blocker == [2]
    assert pool.allocate(3, after=table[-1], room=3) == [3, 4, 5]


def test_scattered_free_blocks_are_all_found() -> None:
    pool = BlockPool(7, 4)
    pool.allocate(7)
    for block in (1, 3, 4, 6):
        pool.release([block])
    assert sorted(pool.allocate(4)) == [1, 3, 4, 6]
    assert pool.num_available == 0


def test_freed_neighbours_become_one_run_again() -> None:
    pool = BlockPool(6, 4)
    pool.allocate(6)
    for block in (1, 3, 2, 4):
        pool.release([block])
    assert pool.allocate(4) == [1, 2, 3, 4]


def test_a_published_prefix_is_found_by_its_tokens() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(3)
    publish_all(pool, table)
    assert look_up(pool, 5) == table


def test_the_same_tokens_behind_another_prefix_are_not_found() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(2)
    publish_all(pool, table)
    assert pool.lookup(ROOT, tokens_at(pool, 1)) is None


@pytest.mark.parametrize("chain", [(1, False), (0, True), ("0", False)])
def test_another_salt_or_rope_regime_shares_nothing(chain: Chain) -> None:
    pool = BlockPool(8, 4)
    publish_all(pool, pool.allocate(1))
    assert pool.lookup(chain, tokens_at(pool, 0)) is None


def test_tokens_of_equal_hash_are_not_taken_for_each_other() -> None:
    pool = BlockPool(8, 2)
    block, other = pool.allocate(2)
    assert hash((ROOT, (-1, 5))) == hash((ROOT, (-2, 5)))
    pool.publish(block, ROOT, (-1, 5))
    assert pool.lookup(ROOT, (-2, 5)) is None
    pool.publish(other, ROOT, (-2, 5))
    assert [found[0] for token in (-1, -2) if (found := pool.lookup(ROOT, (token, 5)))] == [
        block,
        other,
    ]


def test_of_two_blocks_with_the_same_content_the_first_stays_the_shared_one() -> None:
    pool = BlockPool(8, 4)
    first, second = pool.allocate(1), pool.allocate(1)
    chain = pool.publish(first[0], ROOT, tokens_at(pool, 0))
    assert pool.publish(second[0], ROOT, tokens_at(pool, 0)) == chain
    assert look_up(pool, 1) == first
    assert pool.serial_of(second[0]) is None


def test_a_released_prefix_stays_cached_and_can_be_owned_again() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(3)
    publish_all(pool, table)
    pool.release(table)
    assert pool.num_available == 8 and pool.is_cached(table[0])
    pool.share(look_up(pool, 3))
    assert pool.num_available == 5 and not pool.is_cached(table[0])


def test_a_shared_block_is_free_only_when_its_last_owner_gives_it_up() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    publish_all(pool, table)
    pool.share(table)
    pool.release(table)
    assert pool.num_available == 2
    pool.release(table)
    assert pool.num_available == 4


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(4)
    publish_all(pool, table)
    pool.release(table)
    pool.allocate(4)
    assert look_up(pool, 4) == table


def test_the_prefix_given_up_longest_ago_makes_room_first() -> None:
    pool = BlockPool(8, 4)
    old, new = pool.allocate(4), pool.allocate(4)
    publish_all(pool, old)
    publish_all(pool, new, first_token=1000)
    pool.release(old)
    pool.release(new)
    assert pool.allocate(3) == [1, 2, 3]
    assert look_up(pool, 4) == [0]  # the beginning, which is worth most, goes last
    assert look_up(pool, 4, first_token=1000) == new


def test_a_prefix_in_use_never_makes_room() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    publish_all(pool, table)
    pool.allocate(2)
    assert pool.num_available == 0
    assert look_up(pool, 2) == table


def test_room_in_the_cache_is_handed_out_as_a_run() -> None:
    pool = BlockPool(12, 4)
    pool.allocate(12)
    tables = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for number, table in enumerate(tables):
        publish_all(pool, table, first_token=number * 1000)
    for table in (tables[1], tables[0], tables[2]):
        pool.release(table)
    assert pool.allocate(6) == [2, 3, 4, 5, 6, 7]


def test_free_blocks_around_a_cached_one_join_its_run() -> None:
    pool = BlockPool(9, 4)
    pool.allocate(9)
    publish_all(pool, [4])
    pool.release([4])
    for block in (2, 3, 5, 6, 8):
        pool.release([block])
    assert pool.allocate(5) == [2, 3, 4, 5, 6]


def test_a_table_grows_into_a_cached_block_behind_it() -> None:
    pool = BlockPool(8, 4)
    table, cached = pool.allocate(2), pool.allocate(2, after=1)
    publish_all(pool, cached)
    pool.release(cached)
    assert pool.allocate(1, after=table[-1]) == [2]
    assert look_up(pool, 2) == []


def test_a_forgotten_block_is_found_no_more_but_stays_owned() -> None:
    pool = BlockPool(8, 4)
    table = pool.allocate(2)
    publish_all(pool, table)
    pool.forget(table[0])
    pool.forget(table[0])
    assert look_up(pool, 2) == []
    assert pool.num_available == 6
    pool.check_invariants([table])


def test_a_forgotten_cached_block_is_plainly_free() -> None:
    pool = BlockPool(2, 4)
    table = pool.allocate(2)
    publish_all(pool, table)
    pool.release(table)
    pool.forget(table[1])
    assert not pool.is_cached(table[1])
    pool.check_invariants([])


def test_serials_are_never_used_again() -> None:
    pool = BlockPool(1, 4)
    serials = set()
    for number in range(5):
        table = pool.allocate(1)
        serials.add(pool.publish(table[0], ROOT, (number,) * 4))
        pool.release(table)
    assert len(serials) == 5


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(4, 16).blocks_for(tokens) == blocks


def test_a_pool_without_blocks_has_nothing_to_give() -> None:
    pool = BlockPool(0, 16)
    assert pool.num_available == 0 and pool.capacity_tokens == 0
    pool.check_invariants([])


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of owning, growing, publishing, sharing, forgetting and giving up."""

    tables: Bundle[list[int]] = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24, 2)
        self.owned: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # what was published of each block, last

    @rule(target=tables, count=st.integers(1, 8), room=st.integers(0, 30))
    def start(self, count: int, room: int) -> object:
        if count > self.pool.num_available:
            return multiple()
        return self._own(self.pool.allocate(count, room=room))

    @rule(table=tables, count=st.integers(1, 4))
    def grow(self, table: list[int], count: int) -> None:
        if count <= self.pool.num_available:
            before = self.pool.num_available
            more = self.pool.allocate(count, after=table[-1])
            assert len(set(more)) == count and self.pool.num_available == before - count
            assert not any(block in other for other in self.owned for block in more)
            table += more

    @rule(table=tables, tokens=st.lists(st.integers(0, 1), max_size=8))
    def publish(self, table: list[int], tokens: list[int]) -> None:
        chain: Chain = ROOT
        for index, token in enumerate(tokens[: len(table)]):
            block = table[index]
            if self.pool.serial_of(block) is not None:
                break  # a scheduler publishes each block of its table once
            chain = self.pool.publish(block, chain, (token, token))
            self.content[block] = tuple(tokens[: index + 1])

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def share(self, tokens: list[int]) -> object:
        chain, blocks = ROOT, []
        for index, token in enumerate(tokens):
            found = self.pool.lookup(chain, (token, token))
            if found is None:
                break
            block, chain = found
            assert self.content[block] == tuple(tokens[: index + 1])
            blocks.append(block)
        if not blocks:
            return multiple()
        self.pool.share(blocks)
        return self._own(blocks)

    @rule(table=tables, index=st.integers(0, 7))
    def forget(self, table: list[int], index: int) -> None:
        self.pool.forget(table[index % len(table)])

    @precondition(lambda self: self.owned)
    @rule(table=consumes(tables))
    def release(self, table: list[int]) -> None:
        self.owned = [other for other in self.owned if other is not table]
        self.pool.release(table)

    @invariant()
    def nothing_is_lost_or_owned_twice(self) -> None:
        self.pool.check_invariants(self.owned)
        owned = {block for table in self.owned for block in table}
        assert self.pool.num_available == 24 - len(owned)

    def _own(self, table: list[int]) -> list[int]:
        self.owned.append(table)
        return table


TestBlockPool = BlockPoolMachine.TestCase


def test_many_changes_keep_the_bookkeeping_small() -> None:
    pool = BlockPool(512, 4)
    for _ in range(200):
        tables = [pool.allocate(7, room=9) for _ in range(64)]
        for table in tables[::2] + tables[1::2]:
            pool.release(table)
    pool.check_invariants([])
    assert pool.allocate(512) == list(range(512))
