"""When a node of a job that computed nothing is an error."""

from __future__ import annotations

import pytest

from manager.tasks.node_report import NodeReport, check_all_worked
from proto.errors import Error


def reports(*steps: int, generation: int = 0) -> list[NodeReport]:
    return [
        NodeReport(
            node=f"n{rank}",
            rank=rank,
            generation=generation if rank == 1 else 0,
            layers="0:4",
            device="cpu",
            steps=count,
            tokens=count,
            compute_s=0.0,
            peak_rss_bytes=0,
        )
        for rank, count in enumerate(steps)
    ]


def test_a_node_that_computes_nothing_while_others_do_is_named() -> None:
    before = reports(1, 1)
    with pytest.raises(Error, match=r"ran no step: n1 \(section 1\)"):
        check_all_worked(reports(5, 1), before)
    check_all_worked(reports(1, 1), before)  # nothing was left to do
    check_all_worked(reports(5, 5), before)


def test_a_worker_that_was_started_anew_may_have_missed_the_rest() -> None:
    check_all_worked(reports(5, 0, generation=1), reports(1, 1))
