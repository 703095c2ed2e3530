"""tests/get_llama_cpp.sh: what is there is used, what is missing told. Nothing is built here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.llama_cpp import BUILT_VERSION
from tests.support.processes import ROOT

SCRIPT = ROOT / "tests/get_llama_cpp.sh"


def get(cache: Path, *, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT)],
        env={**os.environ, "COMBOIO_TEST_CACHE": str(cache), **({"PATH": path} if path else {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_binaries_that_are_there_are_named_and_left_alone(tmp_path):
    folder = tmp_path / "llama-cpp" / BUILT_VERSION / "bin"
    folder.mkdir(parents=True)
    for name in ("llama-server", "ggml-rpc-server"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    (tmp_path / "llama-cpp/.building.123").mkdir()
    done = get(tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n")
    assert sorted(os.listdir(tmp_path / "llama-cpp")) == [".lock", BUILT_VERSION]


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mkdir", "flock", "rm", "mktemp", "find", "uname", "dirname"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    done = get(tmp_path / "cache", path=str(tools))
    assert done.returncode == 1
    assert "building llama.cpp needs cmake, which is not on PATH" in done.stderr
    assert os.listdir(tmp_path / "cache/llama-cpp") == [".lock"]


def test_the_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
