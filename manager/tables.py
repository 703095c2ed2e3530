"""Plain tables and human sizes. Pure: rows in, text out.

Columns are as wide as their content, never cut: a table that is piped into a file is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns; a column whose cells begin with digits is set flush right."""
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (titles, *rows)
    )


def size(num_bytes: float) -> str:
    """1234567 as "1.2 MB"."""
    power = 0
    while num_bytes >= 999.5 and power < len(UNITS) - 1:
        num_bytes, power = num_bytes / 1000, power + 1
    return f"{num_bytes:.1f} {UNITS[power]}" if power else f"{num_bytes:.0f} B"


def milliseconds(seconds: float | None) -> str:
    """0.00123 as "1.23"; "-" where there is none."""
    return "-" if seconds is None else f"{seconds * 1000:.2f}"
