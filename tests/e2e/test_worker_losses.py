"""Kill any worker at any token: the streams go on, and say what they would have said."""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from engine.sections import Section
from manager.connection import open_pipeline
from manager.event_log import EventLog
from manager.generation import GenerationOptions
from manager.links import Refusal, open_link
from manager.options import ConnectionConfig
from manager.output import Notices
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from proto.address import parse_address
from tests.support.chains import sections_of
from tests.support.fleet import SECTIONS, Asked, Fleet, Heard, ask_all
from tests.support.forked_workers import Nursery

NEW_TOKENS = 12
LONG_PROMPT = 700  # several chunks
# Far beyond what any of it takes, also on a machine that does much else.
PATIENCE = RecoverySettings(timeout_s=90, resplit_after_s=None)
RESPLIT = RecoverySettings(timeout_s=90, resplit_after_s=0)


def prompt_of(length: int) -> list[int]:
    return [10 + (7 * at * at + 13 * length) % 250 for at in range(length)]


def greedy(**options: object) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)  # type: ignore[arg-type]


REQUESTS = [
    *(Asked(prompt_of(length), greedy()) for length in (LONG_PROMPT, 3, 16, 33)),
    Asked(prompt_of(9), greedy(temperature=1.2, top_p=0.95, seed=11)),
    Asked(prompt_of(40), greedy(temperature=0.8, top_k=20, seed=12, logprobs=2)),
    Asked(prompt_of(21), greedy(repetition_penalty=1.3)),
    Asked(prompt_of(27), greedy(temperature=1.0, min_p=0.05, repetition_penalty=1.2, seed=13)),
    Asked(prompt_of(LONG_PROMPT)[::-1], greedy(prompt_logprobs=2)),
    Asked(prompt_of(300), GenerationOptions(max_new_tokens=0, prompt_logprobs=0)),
]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="module")
def fleet(nursery, tiny) -> Fleet:
    return Fleet(nursery, tiny.folder)


@pytest.fixture(scope="module")
def undisturbed(fleet) -> list[Heard]:
    async def ask() -> list[Heard]:
        async with await open_over(fleet.made_whole()) as pipeline:
            heard = await ask_all(pipeline, REQUESTS)
            assert [len(it.prompt_logprobs) for it in heard[-2:]] == [LONG_PROMPT - 1, 299]
            # A text that the model really writes, to stop another request in the same place.
            stop = heard[1].completion.text[4:7]
            stopped = Asked(prompt_of(3), greedy(stop=(stop,)))
            REQUESTS.append(stopped)
            return [*heard, *(await ask_all(pipeline, [stopped]))]

    return asyncio.run(ask())


async def open_over(addresses: list[str], **options: object) -> Pipeline:
    return await Pipeline.open(
        addresses,
        max_sequences=len(REQUESTS) + 1,
        max_tokens_hint=LONG_PROMPT + NEW_TOKENS,
        **options,  # type: ignore[arg-type]
    )


async def until(condition: Callable[[], bool]) -> None:
    """Let the event loop turn until it is so; the pipeline's own deadlines bound it."""
    loop = asyncio.get_running_loop()
    while not condition():
        turned = loop.create_future()
        loop.call_later(0.001, turned.set_result, None)
        await turned


def once(act: Callable[[], None]) -> Callable[[], None]:
    """Act at the first call and do nothing later."""
    acts = [act]
    return lambda: acts.pop()() if acts else None


def at(moment: str, act: Callable[[], None]) -> dict[str, Callable[[int, int], None]]:
    """Act at this moment of a run, told by what came."""
    first = once(act)

    def prefill(done: int, total: int) -> None:
        if total == LONG_PROMPT and done < total:
            first()

    def token(of_request: int, of_all: int) -> None:
        due = {
            "at the first token": True,
            "in the middle": of_all >= len(REQUESTS) * NEW_TOKENS // 2,
            "before the last token": of_request == NEW_TOKENS - 1,
        }
        if due[moment]:
            first()

    return {"on_prefill": prefill} if moment == "during prefill" else {"on_token": token}


MOMENTS = ("during prefill", "at the first token", "in the middle", "before the last token")


def check(heard: list[Heard], undisturbed: list[Heard]) -> None:
    for one, expected in zip(heard, undisturbed, strict=True):
        assert one.story == expected.story
        assert one.prompt_logprobs == pytest.approx(expected.prompt_logprobs, abs=1e-4)
        one.check_pieces()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", range(SECTIONS), ids=["first", "middle", "last"])
@pytest.mark.parametrize("way", ["spare", "restart", "resplit"])
async def test_every_stream_goes_on_as_if_nothing_had_happened(
    fleet, undisturbed, way, victim, moment
):
    addresses = fleet.made_whole(spares=[victim] if way == "spare" else [])
    settings = RESPLIT if way == "resplit" else PATIENCE
    async with await open_over(addresses, recovery=settings) as pipeline:

        def strike() -> None:
            fleet.kill(str(victim))
            if way == "restart":
                fleet.revive(str(victim))

        heard = await ask_all(pipeline, REQUESTS, **at(moment, strike))
        check(heard, undisturbed)
        lost = addresses[victim]
        assert (lost in pipeline.addresses) == (way == "restart")
        assert len(pipeline.addresses) == (SECTIONS - 1 if way == "resplit" else SECTIONS)
        assert pipeline.stats().running == pipeline.stats().waiting == 0
    if way == "resplit":  # they hold other layers than their command lines say
        for name in {str(index) for index in range(SECTIONS)} - {str(victim)}:
            fleet.kill(name)


async def test_a_loss_during_the_recovery_from_another_and_its_log_replayed(
    fleet, undisturbed, tmp_path, call
):
    addresses = fleet.made_whole(spares=[0, 1, 2])
    victims = iter(["1", "1s", "0", "2"])
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        if "was lost" in text:  # before anything was done about it
            for name in victims:
                fleet.kill(name)
            fleet.revive("1")

    log = tmp_path / "events.jsonl"
    async with await open_over(
        addresses, recovery=PATIENCE, on_notice=hear, event_log=EventLog(log)
    ) as pipeline:
        first = at("in the middle", lambda: fleet.kill(next(victims)))
        check(await ask_all(pipeline, REQUESTS, **first), undisturbed)
        names = [fleet.holder(address) for address in pipeline.addresses]
    assert names == ["0s", "1", "2s"]
    assert said[-1].startswith("going on after ")
    answer = call("replay", str(log))
    assert answer.returncode == 0, answer.stderr
    assert "TopologyLost" in answer.stdout
    assert f"{len(REQUESTS)} Submitted" in answer.stdout
    lines = log.read_text().splitlines(keepends=True)
    last = next(at for at in reversed(range(len(lines))) if "StepReturned" in lines[at])
    log.write_text("".join([*lines[:last], *lines[last + 1 :]]))
    changed = call("replay", str(log), "--show")
    assert changed.returncode in (0, 1)
    assert "RunStep" in changed.stdout


async def test_all_but_one_are_lost_one_after_the_other(fleet, undisturbed):
    addresses = fleet.made_whole()
    async with await open_over(addresses, recovery=RESPLIT) as pipeline:
        for victim, left in (("2", 2), ("0", 1)):
            strike = at("in the middle", partial(fleet.kill, victim))
            check(await ask_all(pipeline, REQUESTS, **strike), undisturbed)
            assert len(pipeline.addresses) == left
        assert pipeline.addresses == (addresses[1],)
    fleet.kill("1")


async def test_a_worker_is_lost_while_it_loads_the_layers_of_another(fleet, undisturbed):
    addresses = fleet.made_whole()
    said: list[str] = []

    def hear(text: str) -> None:
        said.append(text)
        if "loads layers" in text and len(said) == 2:
            name = "0" if f"worker {addresses[0]} loads" in text else "1"
            fleet.kill(name)
            fleet.revive(name)

    async with await open_over(addresses, recovery=RESPLIT, on_notice=hear) as pipeline:
        strike = at("in the middle", partial(fleet.kill, "2"))
        check(await ask_all(pipeline, REQUESTS, **strike), undisturbed)
        assert len(pipeline.addresses) == 2
    assert any("loads layers" in text for text in said[2:]), said
    for name in ("0", "1"):
        fleet.kill(name)


async def test_a_frozen_worker_is_replaced_and_welcome_again_when_it_thaws(fleet, undisturbed):
    addresses = fleet.made_whole(spares=[1])
    frozen = fleet["1"]
    async with await open_over(addresses, recovery=PATIENCE) as pipeline:
        freeze = at("in the middle", lambda: frozen.signal(signal.SIGSTOP))
        try:
            check(await ask_all(pipeline, REQUESTS, **freeze), undisturbed)
            assert fleet.holder(pipeline.addresses[1]) == "1s"
        finally:
            frozen.signal(signal.SIGCONT)
        strike = at("in the middle", partial(fleet.kill, "1s"))
        check(await ask_all(pipeline, REQUESTS, **strike), undisturbed)
        assert fleet.holder(pipeline.addresses[1]) == "1"


async def test_what_is_asked_while_there_is_no_chain_waits_for_one(fleet, undisturbed):
    addresses = fleet.made_whole()
    lost = asyncio.Event()
    async with await open_over(
        addresses, recovery=PATIENCE, on_notice=lambda _: lost.set()
    ) as pipeline:
        fleet.kill("1")
        await lost.wait()
        asked = asyncio.create_task(ask_all(pipeline, REQUESTS))
        await until(lambda: pipeline.stats().waiting == len(REQUESTS))
        fleet.revive("1")
        check(await asked, undisturbed)


async def test_when_nobody_comes_requests_end_with_what_is_missing_and_later_ones_run(
    fleet, undisturbed
):
    addresses = fleet.made_whole()
    settings = RecoverySettings(timeout_s=0.3, resplit_after_s=None)
    async with await open_over(addresses, recovery=settings) as pipeline:
        heard = await ask_all(pipeline, REQUESTS, **at("in the middle", partial(fleet.kill, "1")))
        for one, expected in zip(heard, undisturbed, strict=True):
            it = one.completion
            assert it.token_ids == expected.completion.token_ids[: len(it.token_ids)]
            if it.finish_reason != expected.completion.finish_reason:
                assert it.finish_reason == "error"
                assert it.error is not None
                assert f"worker {addresses[1]} was lost" in it.error
                assert "(section 1/3); nobody took its place within 0.3 s" in it.error
                assert "`worker --sections 3 --index 1 --model" in it.error
        assert pipeline.lost is not None
        assert any(one.completion.error for one in heard)
        fleet.revive("1")
        await until(lambda: pipeline.lost is None)
        check(await ask_all(pipeline, REQUESTS), undisturbed)


async def test_a_worker_that_serves_another_manager_keeps_its_layers(fleet):
    addresses = fleet.made_whole()
    settings = RecoverySettings(timeout_s=1.0, resplit_after_s=0)
    async with (
        await open_over(addresses) as other,
        await open_over(addresses, recovery=settings) as pipeline,
    ):
        heard = await ask_all(
            pipeline, REQUESTS[:2], **at("at the first token", partial(fleet.kill, "2"))
        )
        errors = [it.completion.error for it in heard]
        assert all("it serves 1 leases of other managers" in (it or "") for it in errors), errors
        assert other.workers[0].end_layer == pipeline.workers[0].end_layer


async def test_workers_without_room_say_so_with_numbers(nursery, tiny):
    """KV was promised more than there is: nothing is left for other layers."""
    words = sections_of(tiny.folder, 2, "--kv-memory", "1000TB")
    first, last = (nursery.start(*it) for it in words)
    settings = RecoverySettings(timeout_s=0.5, resplit_after_s=0)
    async with await Pipeline.open(
        [first.address, last.address], max_tokens_hint=30, recovery=settings
    ) as pipeline:
        last.kill()
        completion = await pipeline.generate([5, 6, 7], greedy())
        assert completion.error is not None
        assert "the others cannot hold its layers too" in completion.error
        assert f"worker {first.address} has room for 0 MB" in completion.error
    link = await open_link(parse_address(first.address))
    section, fingerprint = Section(0, 4), link.facts.fingerprint
    with pytest.raises(Refusal, match=r"layers 0:4 take 0 MB, and there is room for 0 MB"):
        await link.hold_section(fingerprint, section, lambda _: None)
    with pytest.raises(Refusal, match=r"it holds another model"):
        await link.hold_section("0" * 16, section, lambda _: None)
    with pytest.raises(Refusal, match=r"layers 3:9 are none of the model's 4"):
        await link.hold_section(fingerprint, Section(3, 9), lambda _: None)
    assert (await link.status()).leases == 0
    await link.close()


@pytest.mark.parametrize(("takeover_after", "left"), [(0.0, SECTIONS - 1), (math.inf, 0)])
async def test_whether_others_take_layers_over_is_the_caller_s_choice(
    fleet, undisturbed, takeover_after, left
):
    addresses = fleet.made_whole()
    config = ConnectionConfig(
        workers=",".join(addresses),
        takeover_after=takeover_after,
        recovery_timeout=90 if left else 0.5,
    )
    async with open_pipeline(
        config, Notices(), max_sequences=len(REQUESTS), max_tokens_hint=LONG_PROMPT + NEW_TOKENS
    ) as pipeline:
        strike = at("at the first token", partial(fleet.kill, "2"))
        heard = await ask_all(pipeline, REQUESTS, **strike)
        if left:
            check(heard, undisturbed)
            assert len(pipeline.addresses) == left
            fleet.kill("0")
            fleet.kill("1")
        else:
            errors = [it.completion.error for it in heard if it.completion.error]
            assert errors and all("nobody took its place within 0.5 s" in it for it in errors)


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["--takeover-after", "-1"], {}, "--takeover-after -1: give seconds, from 0"),
        ([], {"COMBOIO_TAKEOVER_AFTER": "nan"}, "--takeover-after nan: give seconds, from 0"),
        (["--takeover-after", "soon"], {}, "'soon' is neither a number of seconds nor the word"),
        (["--recovery-timeout", "-1", "--spawn", "2"], {}, "--recovery-timeout -1: give seconds"),
    ],
)
def test_times_that_make_no_sense_are_refused_before_anything_is_started(call, words, env, said):
    answer = call("generate", "x", *words, env=env)
    assert answer.returncode == 2
    assert said in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_the_command_says_what_it_waits_for_and_goes_on(call, fleet, undisturbed, tiny):
    addresses = fleet.made_whole(spares=[2])
    words = ["--workers", ",".join(addresses), "--max-new-tokens", "8", "--json"]
    before = json.loads(call("generate", "the quick", *words).stdout)
    fleet.kill("2")
    answer = call("generate", "the quick", *words)
    assert answer.returncode == 0, answer.stderr
    after = json.loads(answer.stdout)
    assert after["token_ids"] == before["token_ids"]
    assert [it["address"] for it in after["workers"]] == [*addresses[:2], addresses[3]]
    fleet.made_whole(spares=[2])
    table = json.loads(call("workers", "--workers", ",".join(addresses), "--json").stdout)
    states = {it["address"]: it["state"] for it in table}
    assert [states[it] for it in addresses] == ["stage", "stage", "stage", "spare"]
