"""The examples run as their first lines say."""

from __future__ import annotations

import subprocess
import sys

from tests.support.processes import ROOT, clean_environment


def test_the_pipeline_example_streams_batches_and_loads_a_stage():
    answer = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pipeline_api.py")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        env=clean_environment(),
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert "holds layers 0:" in lines[0]
    assert "[length]" in lines or "[stop]" in lines
    assert sum(" + " in line and "tokens/s" in line for line in lines) == 3
    held, read = lines[-1].split(" bytes held, ")
    assert lines[-1].startswith("section 1 of 2 of demo")
    assert held.split()[-1] == read.split()[0]
