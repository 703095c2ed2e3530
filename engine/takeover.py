"""Who takes over the layers of workers that were lost: the workers that are left, a new cut.

Pure arithmetic: sizes and rooms in, sections out. A worker keeps its section, or holds another one
that fits into its memory, or is not needed. Whoever gets a new section reads all of it, so the cut
is taken whose largest new section is smallest: that is how long everybody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.sections import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A worker that is left."""

    section: Section  # that it holds now
    room_bytes: int  # of weights that it could hold in the place of those
    share: float = 1.0  # bytes that it holds for one byte of the model: less when quantized
    is_fixed: bool = False  # it keeps its section: others use it


# How good a cut is, smaller first: bytes of the largest new section, how many new ones there are,
# bytes of the largest section of all.
_Cost = tuple[float, int, float]
_Cut = tuple[_Cost, tuple[Section | None, ...]]


def take_over(
    holders: Sequence[Holder], layer_bytes: Sequence[int], head_bytes: int
) -> list[Section | None] | None:
    """A section for each of the workers, together all layers once; None where there is no room.

    Returns:
        in the order of `holders`, what each is to hold; None for one that is not needed.
    """
    order = sorted(range(len(holders)), key=lambda at: holders[at].section)
    best: tuple[_Cost, list[Section | None]] | None = None
    for trial in _orders(holders, order):
        found = _cut([holders[at] for at in trial], layer_bytes, head_bytes)
        if found is not None and (best is None or found[0] < best[0]):
            sections: list[Section | None] = [None] * len(holders)
            for at, section in zip(trial, found[1], strict=True):
                sections[at] = section
            best = found[0], sections
    return None if best is None else best[1]


def _orders(holders: Sequence[Holder], order: list[int]) -> list[list[int]]:
    """As they stand, and with each spare in every other place: it may hold what is missing."""
    orders = [order]
    seen: set[Section] = set()
    for at in order:
        if holders[at].section in seen:
            rest = [other for other in order if other != at]
            orders += [[*rest[:place], at, *rest[place:]] for place in range(len(order))]
        seen.add(holders[at].section)
    return orders


def _cut(holders: Sequence[Holder], layer_bytes: Sequence[int], head_bytes: int) -> _Cut | None:
    """The best cut with the workers in this order along the chain."""
    num_layers = len(layer_bytes)
    before = [0, *accumulate(layer_bytes)]
    # By how many layers are held: the best way to hold them with the workers seen so far.
    best: dict[int, _Cut] = {0: ((0.0, 0, 0.0), ())}
    for holder in holders:
        reached: dict[int, _Cut] = {}
        for start, (cost, sections) in best.items():
            _offer(reached, start, (cost, (*sections, None)))
            for end in range(start + 1, num_layers + 1):
                section = Section(start, end)
                is_own = section == holder.section
                num_bytes = before[end] - before[start] + head_bytes * (end == num_layers)
                held = num_bytes * holder.share
                if not is_own and (holder.is_fixed or held > holder.room_bytes):
                    continue
                loaded, count, largest = cost
                found = (
                    loaded if is_own else max(loaded, held),
                    count if is_own else count + 1,
                    max(largest, held),
                )
                _offer(reached, end, (found, (*sections, section)))
        best = reached
    return best.get(num_layers)


def _offer(reached: dict[int, _Cut], layers: int, cut: _Cut) -> None:
    known = reached.get(layers)
    if known is None or cut[0] < known[0]:
        reached[layers] = cut
