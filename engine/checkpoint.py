"""A Hugging Face checkpoint, read by key: its config, and single tensors of its files.

Nothing is read that nobody asked for: a worker opens only the files that hold its own section, and
of those only the byte ranges of its own tensors; a hub id downloads only those files. Where files
are is said by `engine.checkpoint_source`, what stands in one by `engine.safetensors_file`. Knows no
architecture and no layers; `engine.architecture` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from engine.checkpoint_source import INDEX, SINGLE, Folder, Hub, find_source
from engine.copying import unreadable
from engine.json_file import is_printable, parse_object, shown
from engine.safetensors_file import Progress, TensorEntry, map_tensor, read_header, read_tensor
from engine.staged_copy import StagedCopy, read_marker
from proto.errors import ModelError

# Whichever of these a checkpoint has; together they are what transformers' tokenizers read.
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
)
# What a copy of a checkpoint needs beside tensors to be a checkpoint.
SIDE_FILES: Final = ("config.json", INDEX, "generation_config.json", *_TOKENIZER_FILES)
# No JSON beside a model comes near this, the tokenizer's files included.
_MAX_JSON_BYTES: Final = 64 * 2**20


class Checkpoint:
    """One checkpoint, in a folder or in the hub cache, opened without reading a tensor."""

    def __init__(self, model: str | None) -> None:
        """Find the checkpoint's config and its list of tensors.

        Args:
            model: a folder, a hub id ("org/name"), or None for the demo model.
        Raises:
            ModelError: there is no checkpoint there, or one that cannot be read.
        """
        self.model = model
        self._source: Folder | Hub = find_source(model)
        self.name = self._source.name
        # Where tensors are read from; a folder may be such a copy itself, and have holes.
        self._copy = read_marker(self._source.folder)
        self.config_json = self._read_json("config.json", required=True)
        index = self._read_json(INDEX, required=False)
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.read_bytes = 0  # of tensors, so far
        if index is not None:
            self._files = _checked_weight_map(index, self.name)
            listing = json.dumps(self._files, sort_keys=True)
        elif self._source.locate(SINGLE) is not None:
            entries = self._header(SINGLE)
            self._files = dict.fromkeys(entries, SINGLE)
            listing = json.dumps({key: str(entries[key]) for key in sorted(entries)})
        else:
            raise ModelError(self._source.why_no_weights())
        config = json.dumps(self.config_json, sort_keys=True)
        self.fingerprint = hashlib.sha256(f"{config}\n{listing}".encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        """Where config and tokenizer files lie."""
        return self._source.folder

    @contextmanager
    def reading_from(self, copy: StagedCopy) -> Iterator[None]:
        """Read tensors from a copy of this checkpoint, and no other tensors than it has."""
        before, self._copy = self._copy, copy
        try:
            yield
        finally:
            self._copy = before

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors, also of those in files that are not here."""
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def announced(self, key: str) -> TensorEntry:
        """What a header says of a tensor, also where a copy of a slice has a hole.

        Reads (or downloads) the file's header if it was not yet.

        Raises:
            ModelError: the file does not have it, or is not there.
        """
        file, copy = self._files[key], self._copy
        if copy is not None and file not in copy.files and self._source.locate(file) is None:
            raise _hole(copy, key)  # copying had not come so far
        try:
            return self._header(file)[key]
        except KeyError:
            raise ModelError(
                f"{self._source.describe(file)} does not hold tensor {key!r}, "
                f"though {INDEX} says so: the checkpoint is damaged, fetch it again"
            ) from None

    def entry(self, key: str) -> TensorEntry:
        """Where a tensor lies that can be read.

        Raises:
            ModelError: the file does not have it, or a copy of a slice has a hole there.
        """
        entry, copy = self.announced(key), self._copy
        file = entry.file
        if copy is not None and not copy.holds(file, entry.offset, entry.offset + entry.num_bytes):
            raise _hole(copy, key)
        return entry

    def locate(self, file: str) -> Path:
        """A file of the checkpoint itself, no copy's; a hub id's is downloaded.

        Raises:
            ModelError: it is not there.
        """
        path = self._source.locate(file)
        if path is None:
            raise ModelError(
                f"{self._source.describe(file)} is missing, and this section needs tensors of it: "
                "fetch it, or point --model at a complete checkpoint"
            )
        return path

    def read(self, key: str, progress: Progress | None = None) -> Tensor:
        """Read one tensor from disk, and nothing else.

        Raises:
            ModelError: the file cannot be read, or ends before the tensor does; names both.
        """
        entry = self.entry(key)
        tensor = read_tensor(self._data(entry.file), key, entry, progress)
        self.read_bytes += entry.num_bytes
        return tensor

    def read_part(
        self,
        key: str,
        start: int,
        stop: int,
        progress: Progress | None = None,
        buffer: Tensor | None = None,
    ) -> Tensor:
        """Read some entries of a tensor's first axis from disk, and nothing else.

        Args:
            buffer: uint8, at least as long as those entries: what is returned lies in it.
        Raises:
            ModelError: as `read`.
        """
        entry = self.entry(key)
        each = entry.num_bytes // max(1, entry.shape[0])
        part = replace(
            entry,
            shape=(stop - start, *entry.shape[1:]),
            offset=entry.offset + start * each,
            num_bytes=(stop - start) * each,
        )
        tensor = read_tensor(self._data(entry.file), key, part, progress, buffer)
        self.read_bytes += part.num_bytes
        return tensor

    def map(self, key: str) -> Tensor:
        """One tensor as a private mapping of its file: pages are read as they are touched.

        Raises:
            ModelError: the file ends before the tensor does; names both.
        """
        entry = self.entry(key)
        return map_tensor(self._data(entry.file), key, entry)

    def optional_json(self, file: str) -> dict[str, Any] | None:
        """A JSON file that need not be there."""
        parsed: dict[str, Any] | None = self._read_json(file, required=False)
        return parsed

    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files lie, None if there are none; a hub id's are downloaded."""
        found = [self._source.locate(file) for file in _TOKENIZER_FILES]
        for path in found:
            if path is not None:
                _check_json_size(path)
        return self.folder if any(found) else None

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self._headers:
            self._headers[file] = read_header(self.locate(file), file)
        return self._headers[file]

    def _data(self, file: str) -> Path:
        return self.locate(file) if self._copy is None else self._copy.folder / file

    def _read_json(self, file: str, *, required: bool) -> Any:
        path = self._source.locate(file)
        if path is None:
            if required:
                raise ModelError(self._source.why_no_config())
            return None
        try:
            _check_json_size(path)
            return parse_object(path.read_bytes(), each_name_once=file == INDEX)
        except ValueError as exc:
            raise ModelError(f"{path} is not valid JSON ({exc}): fetch it again") from exc
        except OSError as exc:
            raise unreadable(path, exc) from exc


def _check_json_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ModelError(
            f"{path} has {size} bytes, where {_MAX_JSON_BYTES} are the most: fetch it again"
        )


def _checked_weight_map(index: dict[str, Any], name: str) -> dict[str, str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{INDEX} of {name} has no weight_map: fetch it again")
    for key, file in files.items():
        where = f"{INDEX} of {name} puts {shown(key)} into {shown(file)}"
        # A name from a checkpoint must not lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ModelError(f"{where}: not a plain file name")
        if not file.endswith(".safetensors"):
            raise ModelError(f"{where}, which is not a safetensors file")
        if not is_printable(file) or not is_printable(key):
            raise ModelError(f"{where}: a name that nobody can read or write; fetch it again")
    return files


def _hole(copy: StagedCopy, key: str) -> ModelError:
    return ModelError(
        f"{copy.folder} is a copy of layers {copy.layers[0]}:{copy.layers[1]} of {copy.name}, "
        f"without tensor {key!r}: point --model at the whole checkpoint"
    )
