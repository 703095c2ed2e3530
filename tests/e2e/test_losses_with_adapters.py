"""Who takes a lost worker's place learns the adapters: every text goes on with its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manager.generation import GenerationOptions
from manager.pipeline import Pipeline
from manager.recovery import RecoverySettings
from tests.support.adapters import adapted, greedy
from tests.support.fleet import SECTIONS, Asked, Fleet, ask_all
from tests.support.forked_workers import Nursery

NEW_TOKENS = 12
PROMPTS = [[5, 9, 40, 7], [100, 3, 8], [17, 18, 19, 20, 21, 22], [250, 4]]
TARGETS = {"held": {}, "brought": {"target_modules": ["q_proj", "v_proj", "lm_head"]}, "added": {}}


@dataclass(frozen=True)
class Adapted:
    """Three workers that were started with one adapter, two more adapters, and what is expected."""

    fleet: Fleet
    folders: dict[str, Path]
    models: dict[str | None, Any]

    def requests(self, adapters: list[str | None]) -> list[Asked]:
        return [
            Asked(
                PROMPTS[at % len(PROMPTS)],
                GenerationOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True, adapter=adapter),
            )
            for at, adapter in enumerate(adapters)
        ]

    def name_of(self, said: str | None) -> str | None:
        return next((it for it, folder in self.folders.items() if str(folder) == said), said)

    async def check(self, pipeline: Pipeline, asked: list[Asked], strike: Any) -> None:
        strikes = [strike]

        def token(_of_request: int, of_all: int) -> None:
            if of_all >= len(asked) * NEW_TOKENS // 2 and strikes:
                strikes.pop()()

        for request, heard in zip(
            asked, await ask_all(pipeline, asked, on_token=token), strict=True
        ):
            heard.check_pieces()
            assert heard.completion.error is None
            model = self.models[self.name_of(request.options.adapter)]
            assert list(heard.completion.token_ids) == greedy(model, request.prompt, NEW_TOKENS)


@pytest.fixture(scope="module")
def adapters(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    folder = tmp_path_factory.mktemp("followed")
    folders = {name: folder / name for name in TARGETS}
    models: dict[str | None, Any] = {None: tiny.model}
    for seed, (name, settings) in enumerate(TARGETS.items()):
        models[name] = adapted(tiny.model, folders[name], seed=seed, **settings)
    with Nursery() as nursery:
        held = f"--adapter=held={folders['held']}"
        yield Adapted(Fleet(nursery, tiny.folder, "16MB", held), folders, models)


@pytest.mark.parametrize("way", ["spare", "restart", "takeover"])
async def test_texts_go_on_with_their_adapters_on_who_takes_the_place(adapters, way):
    fleet, brought = adapters.fleet, str(adapters.folders["brought"])
    addresses = fleet.made_whole(spares=[2] if way == "spare" else [])
    settings = RecoverySettings(timeout_s=90, resplit_after_s=0 if way == "takeover" else None)
    async with await Pipeline.open(
        addresses, max_tokens_hint=40, recovery=settings, on_notice=print
    ) as pipeline:
        await pipeline.provide_adapters([brought])

        def strike() -> None:
            fleet.kill("2")
            if way == "restart":
                fleet.revive("2")

        asked = adapters.requests(["held", brought, None, brought, "held"])
        await adapters.check(pipeline, asked, strike)
        # Again, by names that nobody was using meanwhile.
        await adapters.check(pipeline, adapters.requests([brought, None, "held"]), lambda: None)
    if way == "takeover":
        for index in range(SECTIONS):
            fleet.kill(str(index))
