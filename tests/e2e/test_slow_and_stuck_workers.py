"""A worker that takes long for a step stays; one that never ends it is replaced; one that is told
to leave ends its step first."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from engine.event_log import replay
from engine.requests import StepReturned, TopologyLost
from manager.event_log import EventLog
from manager.generation import GenerationOptions
from manager.links import open_link
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from proto.address import parse_address
from proto.link_settings import DEFAULT_SETTINGS
from proto.messages import Role
from tests.support.fleet import SECTIONS, Asked, Fleet, Heard, ask_all
from tests.support.forked_workers import Gate, Nursery

SILENCE_S = DEFAULT_SETTINGS.heartbeat_s * DEFAULT_SETTINGS.missed_heartbeats
REQUESTS = [
    Asked(prompt, GenerationOptions(max_new_tokens=12, ignore_eos=True))
    for prompt in ([5, 9, 40, 7], [100, 3, 8])
]


@dataclass(frozen=True)
class Gated:
    """Three workers, the last two behind gates, and what they generate when nothing happens."""

    fleet: Fleet
    middle: Gate
    last: Gate
    undisturbed: list[Heard]

    def check(self, heard: list[Heard]) -> None:
        for one, expected in zip(heard, self.undisturbed, strict=True):
            assert one.story == expected.story
            one.check_pieces()


@pytest.fixture(scope="module")
def gated(tiny, tmp_path_factory) -> Iterator[Gated]:
    folder = tmp_path_factory.mktemp("gates")
    middle, last = Gate(folder / "middle"), Gate(folder / "last")
    with Nursery() as nursery:
        fleet = Fleet(nursery, tiny.folder, "16MB", gates={"1": middle, "2": last})
        addresses = fleet.made_whole()

        async def ask() -> list[Heard]:
            async with await Pipeline.open(addresses, max_tokens_hint=40) as pipeline:
                return await ask_all(pipeline, REQUESTS)

        yield Gated(fleet, middle, last, asyncio.run(ask()))
        middle.remove()
        last.remove()


@asynccontextmanager
async def working_s(address: str) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """How long the worker there has been at its step, as it says itself."""
    link = await open_link(parse_address(address), role=Role.OBSERVER)

    async def ask() -> float:
        return (await link.status()).working_s

    yield ask
    await link.close()


def closing_in_the_middle(gate: Gate) -> Callable[[int, int], None]:
    """The gate closes when half of the tokens are there."""

    def token(_of_request: int, of_all: int) -> None:
        if of_all == len(REQUESTS) * 6:
            gate.close()

    return token


async def test_a_step_of_many_heartbeats_is_waited_for(gated):
    addresses = gated.fleet.made_whole(spares=[1])
    said: list[str] = []
    async with (
        await Pipeline.open(addresses, max_tokens_hint=40, on_notice=said.append) as pipeline,
        working_s(addresses[1]) as at_it_s,
    ):
        token = closing_in_the_middle(gated.middle)
        asked = asyncio.ensure_future(ask_all(pipeline, REQUESTS, on_token=token))
        try:
            while await at_it_s() < 2 * SILENCE_S:
                assert not asked.done()
        finally:
            gated.middle.open()
        gated.check(await asked)
        assert said == []
        assert pipeline.addresses == tuple(addresses[:SECTIONS])


@pytest.mark.parametrize("way", ["spare", "takeover"])
async def test_a_worker_that_never_ends_its_step_is_replaced_though_it_answers(gated, way):
    addresses = gated.fleet.made_whole(spares=[1] if way == "spare" else [])
    settings = RecoverySettings(
        timeout_s=90,
        resplit_after_s=0 if way == "takeover" else None,
        compute_deadline_s=2,
    )
    said: list[str] = []
    async with await Pipeline.open(
        addresses, max_tokens_hint=40, recovery=settings, on_notice=said.append
    ) as pipeline:
        token = closing_in_the_middle(gated.middle)
        try:
            gated.check(await ask_all(pipeline, REQUESTS, on_token=token))
        finally:
            gated.middle.open()
        assert f"worker {addresses[1]} was lost: it has been computing one step for" in said[0]
        assert addresses[1] not in pipeline.addresses
        if way == "spare":  # once its step has ended it is as good as any
            gated.fleet.kill("1s")
            gated.check(await ask_all(pipeline, REQUESTS))
            assert addresses[1] in pipeline.addresses
    if way == "takeover":
        for name in ("0", "1", "2"):
            gated.fleet.kill(name)


async def test_a_worker_that_is_told_to_leave_ends_its_step_and_says_goodbye(gated, tmp_path):
    addresses = gated.fleet.made_whole(spares=[2])
    leaving = gated.fleet["2"]
    close, log = closing_in_the_middle(gated.last), tmp_path / "events.jsonl"
    tokens = 0
    said: list[str] = []

    def token(of_request: int, of_all: int) -> None:
        nonlocal tokens
        tokens = of_all
        close(of_request, of_all)

    async with (
        await Pipeline.open(
            addresses,
            max_tokens_hint=40,
            recovery=RecoverySettings(timeout_s=90, resplit_after_s=None),
            event_log=EventLog(log),
            on_notice=said.append,
        ) as pipeline,
        working_s(addresses[2]) as at_it_s,
    ):
        asked = asyncio.ensure_future(ask_all(pipeline, REQUESTS, on_token=token))
        try:
            while await at_it_s() < SILENCE_S:  # by then nothing else is on its way
                assert not asked.done()
            tokens_before = tokens
            leaving.signal(signal.SIGTERM)
            while "stopping" not in leaving.stderr:
                await at_it_s()
        finally:
            gated.last.open()
        gated.check(await asked)
    assert "it said goodbye: worker is shutting down (SIGTERM)" in said[0]
    with log.open() as lines:
        events = [it.event for it in replay(lines)]
    until_then = events[: events.index(TopologyLost())]
    drawn = [len(it.tokens) for it in until_then if isinstance(it, StepReturned)]
    assert sum(drawn) > tokens_before
    assert await asyncio.to_thread(gated.fleet.left, "2") == 0
