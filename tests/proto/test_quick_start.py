"""A process that starts and leaves quickly still gets rid of cycles, and runs to its end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.processes import ROOT, clean_environment

# Registered before `main` registers its own, it runs after it.
AT_THE_END = """
import atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))
sys.argv = ["it", "--version"]
from {module} import main
main()
"""
CYCLES = """
import gc
from proto.quick_start import NEW_OBJECTS, quick_start
quick_start()
class Node: alive = 0
def make():
    Node.alive += 1
    node = Node()
    node.itself = node
Node.__del__ = lambda self: setattr(Node, "alive", Node.alive - 1)
most = 0
for _ in range(3 * NEW_OBJECTS):
    make()
    most = max(most, Node.alive)
print(most <= NEW_OBJECTS + 1)
"""


def said(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=120, cwd=ROOT, check=True, env=clean_environment(),
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("module", ["worker.cli", "manager.cli"])
def test_a_command_leaves_without_a_search_through_all_objects(module):
    assert said(AT_THE_END.format(module=module)).splitlines()[-1] == "frozen True"


def test_cycles_are_found_all_the_same():
    assert said(CYCLES) == "True\n"
