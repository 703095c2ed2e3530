"""Read single values of a llama-server configuration, as people write them.

Each function takes what a file or an option says and returns the value, or raises ValueError with
a clause that completes "KEY in FILE is VALUE: ...". Pure: knows no key and no file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from datetime import time
from typing import Final

MAX_PORT: Final = 65535
UNLIMITED: Final = "UNLIMITED"

_WHOLE: Final = re.compile(r"[+-]?\d{1,18}")
_CLOCK: Final = re.compile(r"(\d{1,4}):(\d{1,2}):(\d{1,2})")
_DAYS: Final = re.compile(r"(\d{1,3})-(\d{1,2})(?::(\d{1,2})(?::(\d{1,2}))?)?")


def whole(low: int, high: int, what: str = "a whole number") -> Callable[[object], int]:
    """Whole numbers of a range; also as a text, as JSON files of shell scripts have them."""

    def read(value: object) -> int:
        number = _whole(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"it takes {what} from {low} to {high}")
        return number

    return read


port: Final = whole(1, MAX_PORT, "a port")


def number(low: float, high: float) -> Callable[[object], float]:
    """Numbers of a range."""

    def read(value: object) -> float:
        found = math.nan
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                found = float(value)
            except (ValueError, OverflowError):
                pass
        if not low <= found <= high:
            raise ValueError(f"it takes a number from {low:g} to {high:g}")
        return found

    return read


def text(value: object) -> str:
    """A text of one line or more."""
    if not isinstance(value, str):
        raise ValueError("it takes a text")
    if "\0" in value:
        raise ValueError("it takes a text without NUL")
    return value


def flag(value: object) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError("it takes true or false")


def words(value: object) -> tuple[str, ...]:
    """A list of words; a single text is split as a shell would."""
    if isinstance(value, str):
        import shlex

        try:
            return tuple(shlex.split(value))
        except ValueError as exc:  # an open quote
            raise ValueError(f"it takes a list of words ({exc})") from None
    if not isinstance(value, Sequence) or not all(isinstance(word, str) for word in value):
        raise ValueError('it takes a list of words, as ["--flash-attn", "on"]')
    return tuple(value)


def texts(value: object) -> tuple[str, ...]:
    """One text or a list of them, none empty."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(it, str) and it for it in found):
        raise ValueError("it takes a text, or a list of texts")
    return tuple(found)


def shares(value: object) -> tuple[float, ...]:
    """Parts of a whole: "3,1" or [3, 1]; at least one of them is more than nothing."""
    parts = value.split(",") if isinstance(value, str) else value
    read = number(0, 1e9)
    try:
        if not isinstance(parts, Sequence):
            raise ValueError
        found = tuple(map(read, parts))
        if not any(found):
            raise ValueError
    except ValueError:
        raise ValueError('it takes numbers with commas, a share for each, as "3,1"') from None
    return found


def layers(value: object) -> str:
    """How many layers: a number, "auto" or "all", as llama-server takes it."""
    if isinstance(value, str) and value.lower() in ("auto", "all"):
        return value.lower()
    try:
        return str(whole(0, 1_000_000)(value))
    except ValueError:
        raise ValueError('it takes a number of layers, "auto" or "all"') from None


def one_of(*names: str) -> Callable[[object], str]:
    """One of these words."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"it takes one of {', '.join(names)}")
        return value

    return read


def time_limit(value: object) -> str:
    """A time as Slurm takes it, from hours:minutes:seconds, with or without days, or minutes.

    Returns:
        "[DAYS-]HH:MM:SS", or "UNLIMITED".
    """
    if isinstance(value, time):  # TOML reads 00:30:00 as a time of day
        value = value.isoformat()
    if isinstance(value, str) and value.upper() in (UNLIMITED, "INFINITE"):
        return UNLIMITED
    seconds = _seconds(value)
    if seconds <= 0:
        raise ValueError("it takes a time longer than nothing")
    days, rest = divmod(seconds, 24 * 3600)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def _seconds(value: object) -> int:
    minutes = _whole(value)
    if minutes is not None:
        return minutes * 60
    written = value.strip() if isinstance(value, str) else ""
    if clock := _CLOCK.fullmatch(written):
        days, hours, minute, second = 0, *map(int, clock.groups())
    elif long := _DAYS.fullmatch(written):
        days, hours, minute, second = (int(part or 0) for part in long.groups())
    elif re.fullmatch(r"\d+:\d+", written):
        raise ValueError(
            "that may be hours and minutes, or minutes and seconds: "
            "write all three, as 00:30:00 for half an hour"
        )
    else:
        raise ValueError("it takes a time as 00:30:00 or 2-00:00:00, or a number of minutes")
    if minute > 59 or second > 59 or (days and hours > 23):
        raise ValueError("its minutes and seconds go to 59, and with days its hours to 23")
    return ((days * 24 + hours) * 60 + minute) * 60 + second


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    return None
