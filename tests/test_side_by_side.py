"""How several processes share the tests: files stay whole, and who wants to be alone is."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

from tests.support.processes import ROOT, clean_environment
from tests.support.side_by_side import PIECES, piece_of

CONFTEST = """
from tests.support.side_by_side import share_tests

def pytest_configure(config):
    config.addinivalue_line("markers", "alone: as in the project")
    share_tests(config)
"""
# Each test notes when it begins and ends, and which process it runs in. Lines this short are
# written in one piece.
NOTED = """
import os, pytest

def note(word):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{word} {os.environ['PYTEST_XDIST_WORKER']}\\n")

@pytest.mark.parametrize("number", range(20))
def test_noted(number):
    note("begin FILE")
    os.sched_yield()
    note("end FILE")
"""


def test_every_file_that_is_named_is_there():
    for beginnings in PIECES.values():
        for path in beginnings:
            assert (ROOT / path).exists(), path


def test_the_first_piece_that_fits_counts_and_another_file_is_one_by_itself():
    assert piece_of("tests/slurm/test_pipeline_job.py") == (0, "slurm 1")
    assert piece_of("tests/slurm/test_jobs.py") == (1, "slurm 2")
    assert piece_of("tests/proto/test_codec.py") == (len(PIECES), "tests/proto/test_codec.py")


def test_a_file_stays_with_one_process_and_a_test_that_is_alone_has_no_neighbour(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for name in ("a", "b", "c"):
        text = NOTED.replace("FILE", name)
        if name == "b":
            text += "pytestmark = pytest.mark.alone\n"
        (tmp_path / f"test_{name}.py").write_text(text)
    notes = tmp_path / "notes"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", "3", str(tmp_path)],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
        env=clean_environment({"NOTES": str(notes), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 passed" in done.stdout
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert len(lines) == 120
    for name in ("a", "b", "c"):
        assert len({process for _, file, process in lines if file == name}) == 1, name
    for (word, file, _), (then, next_file, _) in pairwise(lines):
        if (word, file) == ("begin", "b"):
            assert (then, next_file) == ("end", "b"), "another ran meanwhile"
