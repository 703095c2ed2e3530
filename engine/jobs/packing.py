"""Put several short samples into one row, so that less of a batch is padding.

Pure arithmetic: lengths in, groups of indices out. That samples of one row do not see each other
is the business of who runs the model: `engine.jobs.batches` numbers each one's positions from 0,
and `engine.jobs.attention_check` makes sure that the model keeps them apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of samples, grouped so that each group's lengths sum up to `capacity` at most.

    Best fit, longest first: each sample goes where it leaves the least room, which needs at most
    11/9 of the fewest groups possible, and a few more (D. S. Johnson, 1973). Groups stand in the
    order of their first samples, so that the same lengths always give the same rows.

    Args:
        lengths: of the samples, each from 1 to `capacity`.
    """
    shortest = min(lengths, default=0)
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, group) where something still fits, sorted
    for index in sorted(range(len(lengths)), key=lambda it: (-lengths[it], it)):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {index} of length {length} does not fit {capacity}")
        at = bisect_left(room, (length, -1))
        if at == len(room):
            groups.append([])
            left, group = capacity, len(groups) - 1
        else:
            left, group = room.pop(at)
        groups[group].append(index)
        if left - length >= shortest:
            insort(room, (left - length, group))
    for members in groups:
        members.sort()
    return sorted(groups)
