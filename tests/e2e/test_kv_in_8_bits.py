"""Keys and values in 8 bits over real workers: a loss changes no token, and all say how it is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from tests.support.chains import TinyModel
from tests.support.fleet import SECTIONS, Asked, Fleet, ask_all
from tests.support.forked_workers import Nursery

NEW_TOKENS = 12


def asked(length: int, **options: object) -> Asked:
    prompt = [10 + (7 * at * at + 13 * length) % 250 for at in range(length)]
    wanted = GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)  # type: ignore[arg-type]
    return Asked(prompt, wanted)


# Two begin alike, over a whole block and more; one takes several chunks.
REQUESTS = [asked(3), asked(300), asked(40), asked(40, temperature=1.0, seed=3)]


@pytest.fixture(scope="module")
def fleet(tiny: TinyModel) -> Iterator[Fleet]:
    with Nursery() as nursery:
        yield Fleet(nursery, tiny.folder, "16MB", "--kv-quantize", "int8")


async def test_a_stream_goes_on_as_if_nothing_had_happened(fleet):
    """Undisturbed, over shared beginnings, and computed anew after a loss: the same tokens."""
    patience = RecoverySettings(timeout_s=90, resplit_after_s=None)
    async with await Pipeline.open(
        fleet.made_whole(spares=[1]), max_sequences=8, max_tokens_hint=400, recovery=patience
    ) as pipeline:
        undisturbed = await ask_all(pipeline, REQUESTS)
        shared = await ask_all(pipeline, REQUESTS)
        strikes = [lambda: fleet.kill("1")]

        def strike(_of_request: int, of_all: int) -> None:
            if strikes and of_all >= len(REQUESTS) * NEW_TOKENS // 2:
                strikes.pop()()

        recovered = await ask_all(pipeline, REQUESTS, on_token=strike)
        names = [fleet.holder(address) for address in pipeline.addresses]
    assert names == ["0", "1s", "2"]
    for heard in (shared, recovered):
        assert [it.story for it in heard] == [it.story for it in undisturbed]
        for one in heard:
            one.check_pieces()


def test_tables_and_plans_know_of_it(fleet, call, tiny):
    option = ",".join(fleet.made_whole())
    assert " keys and values held=int8 bytes_a_token=" in fleet["0"].stderr
    held = [it["facts"] for it in json.loads(call("workers", "--workers", option, "--json").stdout)]
    assert {it["kv_quantize"] for it in held} == {"int8"}
    assert "float32, kv int8" in call("workers", "--workers", option).stdout
    words = ("plan", "--model", str(tiny.folder), "--sections", str(SECTIONS))
    plan = json.loads(call(*words, "--kv-quantize", "int8", "--json").stdout)
    for section, facts in zip(plan["sections"], held, strict=True):
        tokens = plan["context"]
        assert section["kv_bytes"] == tokens * facts["block_bytes"] // facts["block_tokens"]
        assert section["command"].endswith(" --kv-quantize int8")
    assert "tokens in int8, all sequences" in call(*words, "--kv-quantize", "int8").stdout
