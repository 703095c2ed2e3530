"""What adapters may be called, and how one is written on a command line: NAME=DIR.

Pure. A name can stand where programs expect a model's: no spaces, no slash, so that it is never
taken for a folder.
"""

from __future__ import annotations

import re
from typing import Final

from proto.errors import UsageError
from proto.messages import MAX_ADAPTER_NAME_CHARS, MAX_ADAPTER_PATH_CHARS

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]*")
_SEPARATOR: Final = re.compile(r",(?=[A-Za-z0-9][A-Za-z0-9._:+-]*=)")


def is_adapter_name(text: str) -> bool:
    """Whether an adapter can have this name."""
    return len(text) <= MAX_ADAPTER_NAME_CHARS and _NAME.fullmatch(text) is not None


def check_adapter_name(text: str) -> str:
    """The same text.

    Raises:
        UsageError: no adapter can have this name.
    """
    if not is_adapter_name(text):
        raise UsageError(
            f"{text[:80]!r} cannot be an adapter's name: write letters, digits, and . _ : + - "
            f"within, at most {MAX_ADAPTER_NAME_CHARS} characters."
        )
    return text


def parse_adapter(text: str) -> tuple[str, str]:
    """Read NAME=DIR.

    Raises:
        UsageError: it is not that; quotes the text.
    """
    name, equals, folder = text.partition("=")
    if not equals or not folder.strip():
        raise UsageError(
            f"{text[:80]!r} is not NAME=DIR, a name of your choice and an adapter's folder."
        )
    if len(folder) > MAX_ADAPTER_PATH_CHARS:
        raise UsageError(
            f"an adapter's path of {len(folder)} characters is too long: at most "
            f"{MAX_ADAPTER_PATH_CHARS} are possible."
        )
    return check_adapter_name(name), folder


def split_adapters(text: str) -> tuple[str, ...]:
    """Cut a setting NAME=DIR,NAME=DIR; a comma within a path is part of it."""
    return tuple(_SEPARATOR.split(text))
