"""Parse JSON that strangers wrote: what lies beside weights, and the header of weights.

Bounded before it is parsed: a few bytes of JSON can become an object each, and an object takes a
hundred. Knows what JSON may be, nothing of what it says. Reads no file, imports no torch.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

# The largest index there is names some 150,000 tensors, and a header has 8 values for each.
MAX_VALUES: Final = 2_000_000
_MAX_NAME_CHARS: Final = 512
_UNPRINTABLE: Final = re.compile(
    r"[^\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]"
)


def parse_object(data: bytes, *, each_name_once: bool = False) -> dict[str, Any]:
    """The JSON object that some bytes are.

    Raises:
        ValueError: they are none, or one of too many values; says in a few words why.
    """
    # Every value but the first of a list or object has a comma in front, and that has a bracket.
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > MAX_VALUES:
        raise ValueError(f"{values} values, where {MAX_VALUES} are the most")
    try:
        parsed = json.loads(data.decode(), object_pairs_hook=_once if each_name_once else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(parsed, dict):
        raise ValueError("no JSON object")
    return parsed


def is_printable(name: str) -> bool:
    """Whether a name may stand in a sentence: not long, and nothing in it moves a cursor."""
    return len(name) <= _MAX_NAME_CHARS and not _UNPRINTABLE.search(name)


def shown(value: object, most_chars: int = 80) -> str:
    """A value as a sentence quotes it; the beginning of it, if it is long."""
    is_long = isinstance(value, (str, list, tuple)) and len(value) > most_chars
    text = repr(value[:most_chars] if is_long else value)  # type: ignore[index]
    return text if len(text) <= most_chars else f"{text[:most_chars]}..."


def one_line(text: str, most_chars: int = 240) -> str:
    """The first line of foreign words, such that it fits into a sentence of ours."""
    line = next(iter(text[: 4 * most_chars].strip().splitlines()), "")
    line = _UNPRINTABLE.sub("?", line)
    return line if len(line) <= most_chars else f"{line[:most_chars]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for at, name in enumerate(names) if name in names[:at])
        raise ValueError(f"{shown(twice)} stands there twice")
    return made
