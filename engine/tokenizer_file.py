"""See that a tokenizer's files ask for nothing that would fill the memory, or end the process.

The library that reads them is made for files of friends: a length in the wrong place has it take
gigabytes and abort, and rules that replace a letter by a million are carried out. Knows those two
traps; what else is wrong in such a file the library says itself.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any, Final

from engine.json_file import shown
from proto.errors import ModelError

# How many characters may become of one, by all rules together. Real ones put ▁ for a space.
_MOST_GROWTH: Final = 64
_MOST_PREPENDED: Final = 1024
_CHARS_MAP: Final = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')
# A letter of ASCII written as \uXXXX: no program does that, but who wants a name not to be found.
_HIDDEN_LETTER: Final = re.compile(
    rb"(?<!\\)(?:\\\\)*\\u00(?:[46][0-9a-fA-F]|[57][0-9a-eA-E]|5[fF])"
)


def check_tokenizer_file(path: Path) -> None:
    """Look at a tokenizer.json before it is loaded.

    Raises:
        ModelError: its map of characters is longer than it is, or its names are hidden.
    """
    data = path.read_bytes()
    if _HIDDEN_LETTER.search(data):
        raise ModelError(f"{path} writes plain letters as numbers (\\u00..): fetch it again")
    for found in _CHARS_MAP.finditer(data):
        try:
            said = base64.b64decode(found[1])
        except ValueError:
            said = b""
        if len(said) < 4 or int.from_bytes(said[:4], "little") > len(said) - 4:
            raise ModelError(
                f"{path} has a precompiled_charsmap of {len(said)} bytes that is shorter than it "
                "says: fetch it again"
            )


def check_rules(tokenizer: Any, where: str) -> None:
    """Look at the rules of a tokenizer that is loaded, before any text is given to it.

    Raises:
        ModelError: they make too much of a short text; says which.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        rules = getattr(backend, part, None)
        if rules is None or not hasattr(rules, "__getstate__"):
            continue
        state = rules.__getstate__()
        if not isinstance(state, bytes):
            continue
        growth = _growth(json.loads(state))
        if growth > _MOST_GROWTH:
            raise ModelError(
                f"the {part} in tokenizer.json of {where} makes {shown(growth)} characters of one, "
                f"where {_MOST_GROWTH} are the most: fetch it again"
            )
    longest = getattr(tokenizer, "model_max_length", 0)
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise ModelError(
            f"tokenizer_config.json of {where} has model_max_length {shown(longest)}: "
            "it takes a number; fetch it again"
        )


def _growth(rule: Any) -> int:
    """How many characters one rule, and those within it, can make of one."""
    if not isinstance(rule, dict):
        return 1
    growth = 1
    for inner in rule.get("normalizers") or rule.get("decoders") or []:
        growth *= _growth(inner)
    if rule.get("type") == "Replace":
        pattern, content = rule.get("pattern"), rule.get("content", "")
        # An expression can match nothing, in front of every character.
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        growth *= max(1, -(-len(content) // len(literal)) if literal else len(content) + 1)
    if rule.get("type") == "Prepend" and len(rule.get("prepend", "")) > _MOST_PREPENDED:
        growth *= len(rule["prepend"])
    return growth
