"""The OpenAPI document says what the server does: schemathesis calls it by it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import Server


def test_the_server_answers_as_its_document_says(server: Server, tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("needs schemathesis")
    words = [program, "run", f"{server.url}/openapi.json", "--max-examples", "25"]
    words += ["--phases", "examples,coverage,fuzzing", "--generation-deterministic"]
    words += ["--checks", "not_a_server_error,status_code_conformance"]
    words += ["--checks", "content_type_conformance,response_schema_conformance"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
