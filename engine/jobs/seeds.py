"""One seed out of several numbers: random numbers follow from where a run is. Pure."""

from __future__ import annotations


def mixed(*parts: int) -> int:
    """One seed out of several numbers, 63 bits of it (the finalizer of splitmix64)."""
    value = 0
    for part in parts:
        value = (value ^ part) * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value = (value ^ (value >> 31)) + 0x9E3779B97F4A7C15
    return value % 2**63
