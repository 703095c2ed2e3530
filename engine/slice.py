"""What a section needs of a checkpoint, in bytes of files; and what of it a copy has.

Every tensor's range and the header of the files they lie in, and the small files beside them
(config, index, tokenizer), so that a copy is a checkpoint folder with the original's names, sizes
and fingerprint. Which tensors a section needs is said by `engine.weights`. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.copying import FileChanged, look_at, unreadable
from engine.staged_copy import CopiedFile, Range, StagedCopy, merged, read_marker
from proto.errors import ModelError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint


class Slice:
    """One section's part of one checkpoint, as its files are now."""

    def __init__(self, checkpoint: Checkpoint, keys: Iterable[str], layers: Range) -> None:
        """Look where these tensors lie; a hub id's files are downloaded.

        Raises:
            ModelError: a file is missing, damaged, or cannot be read.
        """
        self.layers = layers
        self.title = f"layers {layers[0]}:{layers[1]} of {checkpoint.name}"
        self._checkpoint = checkpoint
        self._entries = {key: checkpoint.entry(key) for key in sorted(set(keys))}
        self.paths: dict[str, Path] = {}  # of the originals, by name
        self.files: dict[str, CopiedFile] = {}  # with the ranges that are needed
        # In the order of copying: what was begun can then be told from a folder of anything.
        self._find_side_files()
        self._find_tensors()
        self.num_bytes = sum(map(range_bytes, (it.ranges for it in self.files.values())))

    def find_in(self, folder: Path) -> StagedCopy | None:
        """The copy in a folder, if it has all of the slice, and of this version."""
        copy = self.as_copy(folder, self.still_good(folder))
        return None if any(self.missing(copy.files).values()) else copy

    def still_good(self, folder: Path) -> dict[str, CopiedFile]:
        """What the copy in a folder has of the files of this slice, if it is of this version."""
        try:
            copy = read_marker(folder)
        except ModelError:  # ours all the same: it will be written anew
            return {}
        if copy is None or copy.fingerprint != self._checkpoint.fingerprint:
            return {}
        return {
            name: copy.files[name]
            for name, it in self.files.items()
            if name in copy.files
            and copy.files[name].is_same_version(it)
            and _size(folder / name) == it.num_bytes
        }

    def missing(self, held: dict[str, CopiedFile]) -> dict[str, tuple[Range, ...]]:
        """Of each file the ranges that are still to be copied."""
        return {
            name: merged(one for one in it.ranges if name not in held or not held[name].holds(*one))
            for name, it in self.files.items()
        }

    def as_copy(self, folder: Path, files: dict[str, CopiedFile]) -> StagedCopy:
        """A copy of this slice that has these files."""
        checkpoint = self._checkpoint
        return StagedCopy(folder, checkpoint.name, checkpoint.fingerprint, self.layers, files)

    def check_unchanged(self, folder: Path) -> None:
        """See whether all files were of one version from the first look to the last byte.

        Args:
            folder: where the copy is.
        Raises:
            FileChanged: one was not.
        """
        from engine.checkpoint import Checkpoint

        for name, path in self.paths.items():
            if not look_at(path).is_same_version(self.files[name]):
                raise FileChanged(path)
        try:
            copy = Checkpoint(str(folder))
            for key, entry in self._entries.items():
                if copy.entry(key) != entry:
                    raise FileChanged(self.paths[entry.file])
        except ModelError as exc:
            raise FileChanged(self._checkpoint.folder) from exc
        if copy.fingerprint != self._checkpoint.fingerprint:
            raise FileChanged(self._checkpoint.folder)

    def is_on_disk_of(self, folder: Path) -> bool:
        """Whether the original lies on the same file system as this folder."""
        try:
            return any(it.stat().st_dev == folder.stat().st_dev for it in self.paths.values())
        except OSError:  # gone since: then nobody can tell
            return False

    def _find_tensors(self) -> None:
        from engine.safetensors_file import truncated

        ranges: dict[str, list[Range]] = {}
        for key, it in self._entries.items():
            if it.file not in ranges:
                self.paths[it.file] = path = self._checkpoint.locate(it.file)
                self.files[it.file] = look_at(path)
                ranges[it.file] = [_header_range(path)]
            size, stop = self.files[it.file].num_bytes, it.offset + it.num_bytes
            if stop > size:
                raise truncated(self.paths[it.file], key, it, size)
            ranges[it.file].append((it.offset, stop))
        for name, found in ranges.items():
            self.files[name] = replace(self.files[name], ranges=tuple(found))

    def _find_side_files(self) -> None:
        from engine.checkpoint import SIDE_FILES

        for name in SIDE_FILES:
            path = self._checkpoint.folder / name
            if path.is_file():
                it = look_at(path)
                self.paths[name] = path
                self.files[name] = replace(it, ranges=((0, it.num_bytes),))


def range_bytes(ranges: Iterable[Range]) -> int:
    """How many bytes there are in them, each counted once."""
    return sum(stop - start for start, stop in merged(ranges))


def _header_range(path: Path) -> Range:
    """A safetensors file begins with its header's length in 8 bytes, and the header."""
    try:
        with path.open("rb", buffering=0) as file:
            return 0, 8 + int.from_bytes(file.read(8), "little")
    except OSError as exc:
        raise unreadable(path, exc) from exc


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
