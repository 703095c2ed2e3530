"""Copy byte ranges of one file to the same places of another, and leave holes between them.

Large sequential reads, and nothing is mapped: a file that shrinks on a network file system is an
error here, and no SIGBUS. Knows no tensor. On a file system without holes the operating system
writes zeros there; only the room they take is different.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from engine.staged_copy import CopiedFile, Range
from proto.errors import ModelError

_READ_BYTES: Final = 16 * 2**20  # large for the file system, short for ctrl-C


class FileChanged(Exception):
    """A file is not what it was when copying began; says its path."""


def look_at(path: Path) -> CopiedFile:
    """A file's size and time, with no range yet.

    Opened, not only looked up: network file systems answer a look-up from what they remember.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            said = os.fstat(file.fileno())
    except OSError as exc:
        raise unreadable(path, exc) from exc
    return CopiedFile(said.st_size, said.st_mtime_ns, ())


def copy_ranges(
    source: Path,
    target: Path,
    version: CopiedFile,
    ranges: Iterable[Range],
    count: Callable[[int], None],
) -> None:
    """Copy some ranges, and bring them to the disk.

    Args:
        target: made with the size of the source where it is not there; else written in place.
        version: what the source was when the ranges were chosen.
        count: called with bytes just copied; may raise to give up.
    Raises:
        FileChanged: the source is not of this version, or was not until the end.
        ModelError: the source cannot be read.
        OSError: the target cannot be written.
    """
    try:
        read = os.open(source, os.O_RDONLY)
    except OSError as exc:
        raise unreadable(source, exc) from exc
    try:
        write = os.open(target, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(write, version.num_bytes)
            for start, stop in ranges:
                _copy_range(read, write, start, stop, source, count)
            os.fsync(write)
        finally:
            os.close(write)
        said = os.fstat(read)
        if (said.st_size, said.st_mtime_ns) != (version.num_bytes, version.modified_ns):
            raise FileChanged(source)
    finally:
        os.close(read)


def unreadable(path: Path, exc: OSError) -> ModelError:
    """What to say of a file of the checkpoint that gives an error."""
    return ModelError(f"{path} cannot be read: {exc.strerror}")


def _copy_range(
    read: int, write: int, start: int, stop: int, source: Path, count: Callable[[int], None]
) -> None:
    buffer = memoryview(bytearray(min(_READ_BYTES, stop - start)))
    _advise(read, start, stop - start, "SEQUENTIAL")
    at = start
    while at < stop:
        try:
            got = os.preadv(read, [buffer[: stop - at]], at)
        except OSError as exc:
            raise unreadable(source, exc) from exc
        if not got:  # it was longer when the range was chosen
            raise FileChanged(source)
        # The next piece can be on its way while this one is written.
        _advise(read, at + got, min(_READ_BYTES, stop - at - got), "WILLNEED")
        done = 0
        while done < got:
            done += os.pwrite(write, buffer[done:got], at + done)
        at += got
        count(got)
    # Nobody on this node reads them again from there; the copy should stay in memory instead.
    _advise(read, start, stop - start, "DONTNEED")


def _advise(number: int, start: int, num_bytes: int, what: str) -> None:
    """Tell the operating system what comes, where it listens."""
    if num_bytes > 0 and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(number, start, num_bytes, getattr(os, f"POSIX_FADV_{what}"))
