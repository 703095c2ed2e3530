"""Blocks are shared out once each, and come back."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists, tuples

from proto.errors import WorkerRefused
from worker.leases import MAX_LEASES, Leases, OpenLease


class Manager:
    """Only who it is matters here."""


def grant(leases: Leases, minimum: int, wanted: int, manager: Any = None) -> OpenLease:
    return leases.grant(
        os.urandom(16),
        min_blocks=minimum,
        want_blocks=wanted,
        manager=manager or Manager(),
        is_traced=False,
    )


@given(total=integers(1, 50), asked=lists(tuples(integers(1, 60), integers(0, 60)), max_size=12))
def test_no_block_is_given_twice_and_all_come_back(
    total: int, asked: list[tuple[int, int]]
) -> None:
    leases = Leases(total, block_tokens=16)
    held: list[OpenLease] = []
    for minimum, more in asked:
        free = leases.free_blocks
        try:
            lease = grant(leases, minimum, minimum + more)
        except WorkerRefused:
            assert free < minimum
        else:
            assert minimum <= lease.num_blocks <= minimum + more
            held.append(lease)
        assert sum(lease.num_blocks for lease in held) + leases.free_blocks == total
    for lease in held:
        leases.close(lease)
        leases.close(lease)  # twice does no harm
    assert leases.free_blocks == total and len(leases) == 0


def test_a_shortage_is_told_with_the_numbers() -> None:
    leases = Leases(10, block_tokens=16)
    grant(leases, 8, 8)
    with pytest.raises(WorkerRefused) as refused:
        grant(leases, 3, 5)
    assert str(refused.value) == (
        "3 KV blocks (48 tokens) are needed, 2 of 10 are free and 8 belong to 1 other leases: "
        "wait for them, ask for fewer tokens, or start the worker with a larger --kv-memory"
    )


def test_there_is_a_limit_to_how_many_leases_are_open() -> None:
    leases = Leases(10 * MAX_LEASES, block_tokens=16)
    held = [grant(leases, 1, 1) for _ in range(MAX_LEASES)]
    with pytest.raises(WorkerRefused, match=f"{MAX_LEASES} leases are open on this worker"):
        grant(leases, 1, 1)
    leases.close(held[0])
    grant(leases, 1, 1)


@pytest.mark.parametrize(("minimum", "wanted"), [(0, 1), (3, 2)])
def test_a_lease_that_makes_no_sense_is_refused(minimum: int, wanted: int) -> None:
    with pytest.raises(WorkerRefused, match="1 <= min_blocks <= want_blocks"):
        grant(Leases(10, block_tokens=16), minimum, wanted)


def test_leases_are_found_by_id_and_by_manager() -> None:
    leases = Leases(10, block_tokens=16)
    ours, theirs = Manager(), Manager()
    lease = grant(leases, 1, 1, ours)
    grant(leases, 1, 1, theirs)
    assert leases.get(lease.id) is lease
    assert leases.of_manager(ours) == [lease]  # type: ignore[arg-type]
    leases.close(lease)
    assert leases.get(lease.id) is None and leases.of_manager(ours) == []  # type: ignore[arg-type]
