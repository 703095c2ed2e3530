"""Other layers that cannot be had leave a worker with those that it held, whatever went wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.stage_loading import load_stage
from proto.address import Address
from proto.messages import HoldSection
from worker.compute import Compute
from worker.config import WorkerConfig
from worker.loading import Loading
from worker.resection import Held, Resections, StillHeld

ASKED = HoldSection(fingerprint="", start_layer=0, end_layer=2)


@pytest.fixture
def held(checkpoint: Path) -> Held:
    stage = load_stage(str(checkpoint), layers=(1, 3), device="cpu")
    unused: Any = SimpleNamespace()
    return Held(stage, facts=unused, adapters=unused)


def resections(
    model: Path, load: Callable[[tuple[int, int], Loading], Awaitable[Held]]
) -> Resections:
    here = Address("127.0.0.1", 0)
    config = WorkerConfig(listen=here, model=str(model), sections=2, index=0)
    return Resections(config, Compute(asyncio.get_running_loop()), load, why_closed=None)


async def test_an_error_that_nobody_thought_of_leaves_the_old_layers(
    checkpoint: Path, held: Held
) -> None:
    async def stumble(layers: tuple[int, int], loading: Loading) -> Held:
        raise RuntimeError("a reader\nof its own")

    changes = resections(checkpoint, stumble)
    with pytest.raises(StillHeld) as still:
        await changes.change(ASKED, held)
    assert still.value.held is held
    assert str(still.value) == "the layers could not be loaded: RuntimeError: a reader of its own"
    assert changes.loading is None


async def test_where_both_do_not_fit_the_old_layers_are_loaded_again(
    checkpoint: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[tuple[int, int]] = []
    again = Held(held.stage, held.facts, held.adapters)

    async def load(layers: tuple[int, int], loading: Loading) -> Held:
        asked_for.append(layers)
        if layers == (0, 2):
            raise RuntimeError("no")
        return again

    changes = resections(checkpoint, load)
    room_bytes = held.stage.stage_bytes + 1000  # for one of them
    monkeypatch.setattr(changes, "room_bytes", lambda stage: room_bytes)
    with pytest.raises(StillHeld) as still:
        await changes.change(ASKED, held)
    assert still.value.held is again
    assert asked_for == [(0, 2), (1, 3)]


async def test_a_checkpoint_that_has_gone_is_a_refusal(
    checkpoint: Path, held: Held, tmp_path: Path
) -> None:
    async def load(layers: tuple[int, int], loading: Loading) -> Held:
        raise AssertionError("nothing is to be loaded")

    with pytest.raises(StillHeld) as still:
        await resections(tmp_path / "gone", load).change(ASKED, held)
    assert still.value.held is held
    assert "gone" in str(still.value)
