"""Tokens that come faster than anybody reads share a piece; the first and the last never wait."""

from __future__ import annotations

import asyncio

from manager.encoding import Prompt
from manager.generation import GenerationOptions, Piece
from manager.pace import AT_ONCE, Pace
from manager.sequences import ActiveSequence
from manager.text import Vocabulary

LONG_S = 3600.0  # nothing that a timer lets go comes within a test


class Reader:
    """Reads a text on the event loop; `tokens` come with a second between them."""

    def __init__(self, pace: Pace) -> None:
        self.text = ActiveSequence(
            0, Prompt((5,)), GenerationOptions(), Vocabulary(None), now_s=0.0, pace=pace
        )
        self.pieces: list[Piece] = []
        self._more = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for piece in self.text.pieces():
            self.pieces.append(piece)
            self._more.set()

    async def has(self, num_pieces: int) -> None:
        while len(self.pieces) < num_pieces:
            self._more.clear()
            await self._more.wait()

    async def takes(self, token: int, at_s: float) -> list[tuple[int, ...]]:
        self.text.token_came(token, None, at_s)
        return await self.seen()

    async def seen(self) -> list[tuple[int, ...]]:
        for _ in range(3):  # the reader's turn
            await asyncio.sleep(0)
        return [piece.token_ids for piece in self.pieces]

    async def ends(self, at_s: float) -> list[tuple[int, ...]]:
        self.text.finish("length", now_s=at_s)
        await self._reading
        return await self.seen()


async def test_tokens_within_an_interval_are_one_piece():
    reader = Reader(Pace(lambda: LONG_S))
    assert await reader.takes(1, at_s=0.0) == [(1,)]
    assert await reader.takes(2, at_s=LONG_S / 2) == [(1,)]
    assert await reader.takes(3, at_s=LONG_S) == [(1,), (2, 3)]
    assert await reader.takes(4, at_s=LONG_S * 1.5) == [(1,), (2, 3)]
    assert await reader.ends(at_s=LONG_S * 1.6) == [(1,), (2, 3), (4,)]
    assert reader.pieces[-1].finish_reason == "length"


async def test_without_an_interval_each_token_is_a_piece():
    reader = Reader(AT_ONCE)
    for token in range(3):
        await reader.takes(token, at_s=1.0)
    assert await reader.ends(at_s=1.0) == [(0,), (1,), (2,), ()]


async def test_a_token_without_a_successor_comes_all_the_same():
    pace = Pace(lambda: 0.01)
    readers = [Reader(pace) for _ in range(2)]
    for reader in readers:
        await reader.takes(1, at_s=1.0)
        assert await reader.takes(2, at_s=1.0) == [(1,)]
    async with asyncio.timeout(30):
        for reader in readers:
            await reader.has(2)
            assert await reader.ends(at_s=1.0) == [(1,), (2,), ()]


async def test_nobody_is_woken_for_what_was_read_already():
    pace = Pace(lambda: 0.01)
    reader, other = Reader(pace), Reader(pace)
    for at_s in (1.0, 1.005, 1.01):
        await reader.takes(1, at_s)
    await other.takes(1, at_s=1.0)
    await other.takes(2, at_s=1.005)
    async with asyncio.timeout(30):
        await other.has(2)  # the timer is over, for both
    assert await reader.takes(2, at_s=1.02) == [(1,), (1, 1), (2,)]
    assert await reader.ends(at_s=1.02) == [(1,), (1, 1), (2,), ()]
    await other.ends(at_s=1.02)
