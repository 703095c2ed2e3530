"""What the server says on stderr: one event a line, then key=value; text or JSON.

    log("request", id="req_1f0c", status=200, tokens=17)
    2026-07-01T12:00:00.123 request id=req_1f0c status=200 tokens=17

Keys and values only: no prompt, no text, no API key ever gets here.
"""

from __future__ import annotations

import json
import re
import sys
import time
from functools import lru_cache
from typing import Final

ONE_WORD: Final = re.compile(r'[^\s"=]+')


class Log:
    """One stream of events."""

    def __init__(self, log_format: str = "text") -> None:
        self._is_json = log_format == "json"

    def __call__(self, event: str, **values: object) -> None:
        """Write one line; what is None is left out."""
        kept = {name: value for name, value in values.items() if value is not None}
        second, part_s = divmod(time.time(), 1)
        at = f"{_to_the_second(second)}.{int(part_s * 1000):03d}"
        if self._is_json:
            said = {"time": at, "event": event, **kept}
            line = json.dumps(said, ensure_ascii=False, default=str)
        else:
            line = " ".join([at, event, *(f"{name}={_plain(it)}" for name, it in kept.items())])
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            pass  # nobody reads it


@lru_cache(maxsize=1)  # of the lines that come at once
def _to_the_second(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(at_s))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if ONE_WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)
