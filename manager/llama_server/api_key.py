"""Find the API key of a llama-server: in a file, or where programs for such servers look.

A key is never shown, and never sent to another server than the one it was given for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from manager.llama_server.server_url import parse_server
from proto.errors import UsageError

OWN_VARIABLE: Final = "LLAMA_API_KEY"  # llama-server reads its key from it
OPENAI_VARIABLES: Final = ("OPENAI_BASE_URL", "OPENAI_API_KEY")
MAX_FILE_BYTES: Final = 64 * 1024


def find_api_key(server: str, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The key in `file`, else LLAMA_API_KEY, else OPENAI_API_KEY; None without any.

    OPENAI_API_KEY counts only where OPENAI_BASE_URL names this very server: else it is the key of
    a service that charges for it.

    Args:
        server: as `parse_server` gives it.
    Raises:
        UsageError: the file cannot be read, can be read by others, or has no key in it.
    """
    if file is not None:
        return read_api_key_file(file)
    if key := environ.get(OWN_VARIABLE):
        return _checked(key, OWN_VARIABLE)
    base_url, key = (environ.get(name, "") for name in OPENAI_VARIABLES)
    if key and base_url and _is_same(base_url, server):
        return _checked(key, OPENAI_VARIABLES[1])
    return None


def read_api_key_file(path: Path) -> str:
    """The first line that is not blank: llama-server's own file has a key a line.

    Raises:
        UsageError: as `find_api_key`.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_FILE_BYTES)
    except OSError as exc:
        raise UsageError(f"--api-key-file {path} cannot be read: {exc.strerror}.") from exc
    if mode & 0o077:
        raise UsageError(
            f"--api-key-file {path} can be read or written by others (mode {mode:04o}): "
            f"run `chmod 600 {path}`."
        )
    lines = [line.strip() for line in content.decode("latin-1").splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--api-key-file {path} has no key in it: write the server's there.")
    return _checked(lines[0], f"--api-key-file {path}")


def _checked(key: str, where: str) -> str:
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{where} has something else than a key in it: a key is printable ASCII without spaces."
        )
    return key


def _is_same(base_url: str, server: str) -> bool:
    try:
        return parse_server(base_url) == server
    except UsageError:
        return False
