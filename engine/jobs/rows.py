"""A row of training data, and where it stands, for sentences about it.

Pure. Knows no file format and no shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from proto.errors import UsageError

Row = Mapping[str, Any]  # column to value

SHOWN_CHARS: Final = 60  # of a value, in a sentence


class DataError(UsageError):
    """Data that cannot be used: which file and line, and what is wrong there."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands."""

    file: str
    number: int | None  # None: the whole file
    unit: str = ""  # "" for lines, else what the number counts: "item", "row"

    def __str__(self) -> str:
        if self.number is None:
            return self.file
        return (
            f"{self.file}: {self.unit} {self.number}" if self.unit else f"{self.file}:{self.number}"
        )

    def bad(self, what: str) -> DataError:
        """What is wrong there."""
        return DataError(f"{self}: {what}")


def shown(value: object) -> str:
    """A value in a sentence."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
