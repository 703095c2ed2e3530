"""What was read, what became of it, and what was dropped and why: counts and lengths.

Plain numbers, for tables, for JSON and for the report of a run. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

PLACES_KEPT: Final = 3  # of dropped samples, for each reason


@dataclass(slots=True)
class Lengths:
    """Of rows, in tokens."""

    p50: int = 0
    p95: int = 0
    max: int = 0
    mean: float = 0.0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """The values at these ranks of the sorted lengths."""
        if not lengths:
            return cls()
        ordered = sorted(lengths)

        def at(share: float) -> int:
            return int(ordered[min(len(ordered) - 1, int(share * len(ordered)))])

        return cls(at(0.50), at(0.95), int(ordered[-1]), sum(ordered) / len(ordered))


@dataclass(slots=True)
class Split:
    """The training data, or the validation data."""

    samples: int = 0  # read and kept
    rows: int = 0  # what is trained on: more than samples where texts were cut, fewer if packed
    tokens: int = 0
    learnt_tokens: int = 0
    lengths: Lengths = field(default_factory=Lengths)  # of rows
    fill: float | None = None  # of packed rows: tokens by rows * max_length


@dataclass(slots=True)
class DataSummary:
    """Of one job's data."""

    sources: list[dict[str, Any]] = field(default_factory=list)  # name, shape, samples, split
    train: Split = field(default_factory=Split)
    validation: Split | None = None
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> samples
    dropped_places: dict[str, list[str]] = field(default_factory=dict)
    shortened: int = 0  # samples whose end did not fit
    cut: int = 0  # texts that take several rows
    hidden_turns: int = 0
    languages: Counter[str] = field(default_factory=Counter)  # before the filter
    ignored: list[str] = field(default_factory=list)  # files of other splits
    max_length: int = 0
    packing: bool = False
    template: str | None = None  # None: no instruction and no conversation among the data
    notes: list[str] = field(default_factory=list)

    def drop(self, place: object, reason: str) -> None:
        """One sample is not trained on."""
        self.dropped[reason] += 1
        places = self.dropped_places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(str(place))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "dropped": dict(self.dropped.most_common()),
            "languages": dict(self.languages.most_common()),
        }

    def sentences(self) -> list[str]:
        """What went differently than somebody may expect, a line each."""
        said = [
            f"dropped {count}: {reason} ({', '.join(self.dropped_places[reason])}"
            f"{', ...' if count > len(self.dropped_places[reason]) else ''})"
            for reason, count in self.dropped.most_common()
        ]
        if self.shortened:
            said.append(f"shortened {self.shortened} to --max-length {self.max_length} tokens")
        if self.cut:
            said.append(f"cut {self.cut} texts that are longer than {self.max_length} tokens")
        if self.hidden_turns:
            said.append(
                f"{self.hidden_turns} earlier answers are not learnt: the chat template writes "
                "them in another way once later messages follow"
            )
        if self.ignored:
            said.append(f"not read, as another split: {', '.join(self.ignored)}")
        return said + self.notes
