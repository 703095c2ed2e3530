"""Where the tests find llama.cpp's real binaries; tests/get_llama_cpp.sh builds them."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

SERVER = "llama-server"
RPC_SERVERS = ("rpc-server", "ggml-rpc-server")
BUILT_VERSION = "0.3.36"  # of llama-cpp-python, as tests/get_llama_cpp.sh has it


@cache
def llama_cpp_dir() -> Path | None:
    """The folder that holds llama-server and rpc-server; None where there is none.

    Looked for in LLAMA_CPP_DIR, on PATH, and where tests/get_llama_cpp.sh puts them.
    """
    named = os.environ.get("LLAMA_CPP_DIR")
    if named:
        roots = [Path(named), Path(named, "bin"), Path(named, "build/bin")]
        return next((folder for folder in roots if _has_both(folder)), None)
    found = shutil.which(SERVER)
    folders = [Path(found).parent] if found else []
    return next((folder for folder in [*folders, _built()] if _has_both(folder)), None)


def why_no_llama_cpp() -> str | None:
    """Why tests with the mark `llama_cpp` are skipped; None where they run."""
    if llama_cpp_dir() is not None:
        return None
    return (
        "needs llama-server and rpc-server on PATH or in LLAMA_CPP_DIR; "
        "tests/get_llama_cpp.sh builds them"
    )


def _built() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache_folder = Path(os.environ.get("COMBOIO_TEST_CACHE") or home / "comboio")
    return cache_folder / "llama-cpp" / BUILT_VERSION / "bin"


def _has_both(folder: Path) -> bool:
    return _is_program(folder / SERVER) and any(_is_program(folder / it) for it in RPC_SERVERS)


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
