"""A peer's words, which end up on somebody's terminal. Pure."""

from __future__ import annotations


def printable(text: str) -> str:
    """The same on one line, with a space for whatever could play with a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)
