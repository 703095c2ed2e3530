"""Where a single answer goes: its text in one file, how it went in another beside it.

    answer.txt                the text, as the model wrote it
    answer.txt.timings.json   tokens, seconds, model, rpc-servers

A name that ends in .json gets one file with both. Files appear whole or not at all; a device or a
pipe is written to as it is, and gets the text alone.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from proto.errors import Error, UsageError

TIMINGS_SUFFIX: Final = ".timings.json"
STREAMS: Final = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")


def check_result_file(key: str, path: Path) -> None:
    """Refuse a place that nothing can be written to, before anything runs.

    Raises:
        UsageError: it is a folder, or lies in one that is not there or not ours to write.
    """
    if path.is_dir():
        raise UsageError(f"{key} {path} is a folder: name a file.")
    if is_device(path):
        return
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"{key} {path}: there is no folder {folder}, make it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{key} {path}: nothing can be written into {folder}.")


def write_result(path: Path, text: str, timings: Mapping[str, Any]) -> None:
    """Write an answer and how it went.

    Raises:
        Error: the disk is full, or the folder gone.
    """
    if path.suffix.lower() == ".json":
        write_whole(path, _json({"text": text, **timings}))
        return
    ended = text if text.endswith("\n") else f"{text}\n"
    write_whole(path, ended)
    if is_device(path):
        return
    write_whole(path.with_name(path.name + TIMINGS_SUFFIX), _json(timings))


def write_whole(path: Path, text: str) -> None:
    """Put a text into a file, in one go.

    Raises:
        Error: it cannot be written.
    """
    if is_device(path):
        _write_into(path, text)
        return
    target = Path(os.path.realpath(path))  # a link stays one
    partial: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        partial = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(_mode(target))
        partial.replace(target)
    except OSError as exc:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise Error(f"cannot write {path}: {exc.strerror}") from exc


def is_device(path: Path) -> bool:
    """Whether it is something that is never replaced: /dev/stdout, /dev/null, a pipe."""
    # A redirected stdout is a file, and not ours to replace either.
    if str(path).startswith(STREAMS):
        return True
    return path.exists() and not path.is_dir() and not path.is_file()


def _write_into(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as exc:
        raise Error(f"cannot write {path}: {exc.strerror}") from exc


def _mode(target: Path) -> int:
    """What the file had, or what a new one would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
