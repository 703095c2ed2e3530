"""What a copy of a slice of a checkpoint holds, as the marker file beside it says.

Such a copy is a checkpoint folder whose files have their full sizes, with holes where other
sections' tensors would be. The marker names the byte ranges that are there, so that nobody takes
a hole's zeros for weights. Knows ranges and JSON; `engine.staging` makes the copies, and
`engine.checkpoint` asks before it reads. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.json_file import parse_object
from proto.errors import ModelError

MARKER: Final = "comboio-slice.json"
_VERSION: Final = 1
_MAX_BYTES: Final = 64 * 2**20  # of the marker

Range = tuple[int, int]  # bytes [start, stop) of a file


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """Ranges of one file, and which version of the original they are from."""

    num_bytes: int  # of the whole original
    modified_ns: int
    ranges: tuple[Range, ...]

    def holds(self, start: int, stop: int) -> bool:
        """Whether these bytes are there; none at all always are."""
        return start >= stop or any(first <= start and stop <= end for first, end in self.ranges)

    def is_same_version(self, other: CopiedFile) -> bool:
        """Whether both are from the same original, as far as size and time tell."""
        return (self.num_bytes, self.modified_ns) == (other.num_bytes, other.modified_ns)


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """One folder with a slice of one checkpoint."""

    folder: Path
    name: str  # the checkpoint's
    fingerprint: str  # the whole checkpoint's
    layers: Range
    files: dict[str, CopiedFile]

    def holds(self, file: str, start: int, stop: int) -> bool:
        """Whether the copy has these bytes of that file."""
        return file in self.files and self.files[file].holds(start, stop)

    def save(self) -> None:
        """Write the marker; after a power cut the old one stands there, or this one.

        Raises:
            OSError: the folder cannot be written.
        """
        said = {
            "version": _VERSION,
            "what": f"a part of {self.name}: the files have holes, and only these ranges are there",
            "name": self.name,
            "fingerprint": self.fingerprint,
            "layers": self.layers,
            "files": {
                name: {
                    "num_bytes": it.num_bytes,
                    "modified_ns": it.modified_ns,
                    "ranges": it.ranges,
                }
                for name, it in sorted(self.files.items())
            },
        }
        new = self.folder / f"{MARKER}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump(said, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / MARKER)
        sync_folder(self.folder)


def read_marker(folder: Path) -> StagedCopy | None:
    """What the copy in a folder holds; None where no marker stands, as in any whole checkpoint.

    Raises:
        ModelError: the marker cannot be read, or is not one of ours.
    """
    path = folder / MARKER
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _damaged(path)
        said = parse_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as exc:
        raise _damaged(path) from exc
    try:
        if said["version"] != _VERSION:
            raise ModelError(f"{path} is of another release of comboio: delete {folder}")
        start, end = said["layers"]
        files = {name: _copied_file(it) for name, it in said["files"].items()}
        return StagedCopy(
            folder, str(said["name"]), str(said["fingerprint"]), (int(start), int(end)), files
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise _damaged(path) from exc


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same bytes in as few ranges as can be, ascending; empty ones are left out."""
    joined: list[Range] = []
    for start, stop in sorted(it for it in ranges if it[0] < it[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, on file systems that know of such a thing."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


def _copied_file(said: dict[str, object]) -> CopiedFile:
    ranges = said["ranges"]
    if not isinstance(ranges, list):
        raise ValueError("no ranges")
    return CopiedFile(
        num_bytes=int(str(said["num_bytes"])),
        modified_ns=int(str(said["modified_ns"])),
        ranges=merged((int(start), int(stop)) for start, stop in ranges),
    )


def _damaged(path: Path) -> ModelError:
    return ModelError(f"{path} is damaged: delete {path.parent}, a worker makes it anew")
