"""Where a llama-server is, as people write it: http://HOST:PORT, HOST:PORT, with or without /v1.

Pure. Resolves no name and opens nothing.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import SplitResult, urlsplit

from proto.errors import UsageError

EXAMPLE: Final = "http://127.0.0.1:8080"
API: Final = "/v1"  # where OpenAI's part begins; clients are often given the address with it


def parse_server(text: str) -> str:
    """The address without a slash at its end and without /v1.

    Raises:
        UsageError: it is none, or has a password in it.
    """
    stripped = text.strip()
    try:
        parts = urlsplit(stripped if "://" in stripped else f"http://{stripped}")
        port = parts.port  # read here: a bad one raises
    except ValueError as exc:
        raise _bad(text, str(exc)) from exc
    _check(text, parts, has_port=port is not None or "://" in stripped)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    path = parts.path.rstrip("/").removesuffix(API).rstrip("/")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def _check(text: str, parts: SplitResult, *, has_port: bool) -> None:
    if parts.username is not None or parts.password is not None:
        # Not shown: it would stand in logs.
        raise UsageError(
            "--server has a user or a password in it: name the server alone, and pass its API key "
            "with --api-key-file FILE."
        )
    if parts.scheme not in ("http", "https"):
        raise _bad(text, f"it is reached by http or https, not by {parts.scheme}")
    if not parts.hostname or any(character.isspace() for character in text.strip()):
        raise _bad(text, "it names no host")
    if not has_port or parts.port == 0:
        raise _bad(text, "it names no port")
    if parts.query or parts.fragment:
        raise _bad(text, "it goes on after the path")


def _bad(text: str, why: str) -> UsageError:
    return UsageError(f"--server {text!r} is no llama-server's address ({why}): write {EXAMPLE}.")
