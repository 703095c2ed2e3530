"""A step that nobody waits for any more costs torch nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.stage_loading import load_stage
from proto.framing import Frame
from tests.support.wire import Part, pack
from worker.leases import OpenLease
from worker.passage import Passage
from worker.steps import StepComputer


@pytest.fixture
def computer(checkpoint: Path) -> StepComputer:
    stage = load_stage(str(checkpoint), layers=(1, 2), device="cpu")
    return StepComputer(stage, stage.new_cache(4), 4, "board:7710")


@pytest.mark.parametrize(
    ("change", "is_computed"),
    [
        (lambda lease, source: None, True),
        (lambda lease, source: setattr(lease, "epoch", 2), False),
        (lambda lease, source: setattr(lease, "is_closed", True), False),
        (lambda lease, source: setattr(source, "is_open", False), False),
    ],
    ids=["as it was", "rerouted", "lease closed", "link closed"],
)
def test_a_queued_step_is_computed_only_while_its_lease_route_and_link_stand(
    computer: StepComputer,
    part: Callable[..., Part],
    change: Callable[[Any, Any], None],
    is_computed: bool,
) -> None:
    source: Any = SimpleNamespace(is_open=True)
    lease = OpenLease(id=bytes(16), num_blocks=4, manager=source, is_traced=False, epoch=1)
    step, tables, hidden = pack(lease.id, 1, [part(1, [1, 2])])
    frame = Frame(step, 1, memoryview(bytearray(tables + bytes(hidden))))
    finished: list[Passage] = []
    passage = Passage(
        frame, step, lease=lease, computer=computer, source=source, hand_on=finished.append
    )
    change(lease, source)
    passage.compute()
    passage.finish()
    assert finished == [passage]
    assert (passage.outcome is not None) == is_computed
