"""How a worker's log lines look: one event, then key=value; text or JSON, on stderr.

    log.info("lease opened", extra=fields(lease="1f0c", blocks=64))
    2025-07-01T12:00:00.123 info lease opened lease=1f0c blocks=64

Knows no event: whoever logs names it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

ROOT: Final = "comboio"


def fields(**values: object) -> dict[str, object]:
    """What `extra=` takes, so that both formats show the same keys."""
    return {"fields": values}


def set_up(level: str, log_format: str) -> None:
    """Send everything under the logger `comboio` to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, object]:
    values = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[0] is not None:
        values["error"] = f"{record.exc_info[0].__name__}: {record.exc_info[1]}"
    return values


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}"


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A line for people; values with spaces are quoted."""
        line = f"{_time(record)} {record.levelname.lower()} {record.getMessage()}"
        for key, value in _fields(record).items():
            text = str(value)
            is_plain = text and not any(c.isspace() or c in '"=' for c in text)
            # A peer's words may be in it, and the line on a terminal.
            is_safe = text.isprintable()
            if not is_plain or not is_safe:
                text = json.dumps(text, ensure_ascii=not is_safe)
            line += f" {key}={text}"
        if record.exc_info and record.levelno <= logging.DEBUG:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """A JSON object on one line."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_fields(record),
        }
        return json.dumps(line, ensure_ascii=False, default=str)
