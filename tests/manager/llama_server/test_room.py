"""How many requests run at once on a server that was full."""

from __future__ import annotations

import asyncio

from manager.llama_server.room import Room


async def test_as_many_run_as_come_until_the_server_was_full_and_then_half_of_its_slots():
    room = Room(num_slots=4)
    running, most, failed = 0, 0, 0

    async def request() -> None:
        nonlocal running, most, failed
        while True:
            async with room.place() as place:
                running += 1
                most = max(most, running)
                await asyncio.sleep(0)
                is_full = running > 2
                await asyncio.sleep(0)
                running -= 1
                if not is_full:
                    return
                failed += 1
                assert room.make_room(place)
                most = 0

    await asyncio.gather(*(request() for _ in range(9)))
    assert room.limit == 2
    assert failed
    assert most <= 2


async def test_a_request_that_was_alone_does_not_run_again():
    room = Room(num_slots=4)
    async with room.place() as place:
        assert not room.make_room(place)
    assert room.limit is None


async def test_those_that_failed_together_halve_the_number_once():
    room = Room(num_slots=8)
    async with room.place() as first, room.place() as second, room.place(), room.place():
        assert room.make_room(first)
        assert room.make_room(second)
        assert room.limit == 2
    async with room.place() as first, room.place():
        assert room.make_room(first)
        assert room.limit == 1
    async with room.place() as alone:
        assert not room.make_room(alone)
