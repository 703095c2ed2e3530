"""How the processes of `pytest -n 3` share the tests: what stays together, goes first, runs alone.

A file is run by one process from its first test to its last, so that what a module shares is made
once. Files that share more than that, a cluster or workers, stay together too. Without `-n` there
is one process, and nothing here has an effect.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Pieces of work, by what they are called and how the paths of their files begin; the first that
# fits counts, and any other file is a piece by itself. What takes longest stands first, so that no
# process is left with it at the end.
PIECES = {
    "slurm 1": (
        "tests/slurm/test_pipeline_job.py",
        "tests/slurm/test_readme_on_slurm.py",
        "tests/slurm/test_finetune_jobs.py",
        "tests/slurm/test_nodes.py",
    ),
    "slurm 2": ("tests/slurm/",),
    "chain": (
        "tests/e2e/test_batch.py",
        "tests/e2e/test_generate.py",
        "tests/e2e/test_kv_pressure.py",
        "tests/e2e/test_pipeline.py",
        "tests/e2e/test_workers_and_plan.py",
    ),
    "axonn": ("tests/e2e/test_finetune_axonn.py",),
    "lora": ("tests/e2e/test_finetune_lora.py",),
    "sft": ("tests/e2e/test_finetune_sft.py",),
}


def piece_of(path: str) -> tuple[int, str]:
    """Its place in the order, and the name of the piece of work that a test's file belongs to."""
    for place, (name, beginnings) in enumerate(PIECES.items()):
        if path.startswith(beginnings):
            return place, name
    return len(PIECES), path


def share_tests(config: pytest.Config) -> None:
    """Have xdist do as this file says, where it is what runs the tests."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(_Runner(Path(config.workerinput["turns"])))
    elif config.getoption("dist", "no") != "no":
        config.pluginmanager.register(_Divider())


class _Divider:
    """In the process that hands out the tests."""

    def __init__(self) -> None:
        self._turns = tempfile.TemporaryDirectory(prefix="comboio-turns-")

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["turns"] = self._turns.name

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from xdist.scheduler import LoadScopeScheduling

        class PieceByPiece(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return piece_of(nodeid.split("::")[0])[1]

        config.option.loadscopereorder = False  # the order is that of the collection
        return PieceByPiece(config, log)

    def pytest_unconfigure(self) -> None:
        self._turns.cleanup()


class _Runner:
    """In a process that runs tests."""

    def __init__(self, turns: Path) -> None:
        self._gate, self._room = turns / "gate", turns / "room"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: piece_of(item.nodeid.split("::")[0])[0])

    # Tests are in the room together. Whoever wants it alone shuts the gate until all have left.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        with open(self._room, "a") as self._place:
            self._enter(fcntl.LOCK_SH)
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        if item.get_closest_marker("alone") is None:
            return (yield)
        self._enter(fcntl.LOCK_EX)
        try:
            return (yield)
        finally:
            fcntl.flock(self._place, fcntl.LOCK_SH)

    def _enter(self, how: int) -> None:
        fcntl.flock(self._place, fcntl.LOCK_UN)
        with open(self._gate, "a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(self._place, how)
