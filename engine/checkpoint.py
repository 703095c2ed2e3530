"""Read a Hugging Face checkpoint by key: its config, and single tensors of its safetensors files.

Nothing is read that nobody asked for: a worker opens only the files that hold its own section, and
of those only the byte ranges of its own tensors; a hub id downloads only those files. Nothing is
ever unpickled. Knows no architecture and no layers; `engine.architecture` does.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.copying import unreadable
from engine.json_file import is_printable, parse_object, shown
from engine.staged_copy import StagedCopy, read_marker
from proto.errors import ModelError

DEMO_MODEL: Final = Path(__file__).parent / "demo"

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
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
SIDE_FILES: Final = ("config.json", _INDEX, "generation_config.json", *_TOKENIZER_FILES)
# The safetensors format allows headers up to 100 MB; no JSON beside a model comes near that.
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_JSON_BYTES: Final = 64 * 2**20  # of the tokenizer's files as well
_MAX_AXES: Final = 8
_MAX_BYTES: Final = 2**50  # of one file; keeps numbers of a header from growing without end
_READ_BYTES: Final = 16 * 2**20  # per read call, so that progress moves and ctrl-C is heard

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}

Progress = Callable[[int], None]  # called with bytes just read


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte within the file
    num_bytes: int


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
        self._source: _Folder | _Hub = _find(model)
        self.name = self._source.name
        # Where tensors are read from; a folder may be such a copy itself, and have holes.
        self._copy = read_marker(self._source.folder)
        self.config_json = self._read_json("config.json", required=True)
        index = self._read_json(_INDEX, required=False)
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self.read_bytes = 0  # of tensors, so far
        if index is not None:
            self._files = _checked_weight_map(index, self.name)
            listing = json.dumps(self._files, sort_keys=True)
        elif self._source.locate(_SINGLE) is not None:
            entries = self._header(_SINGLE)
            self._files = dict.fromkeys(entries, _SINGLE)
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
                f"though {_INDEX} says so: the checkpoint is damaged, fetch it again"
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
        path = self._data(entry.file)
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if entry.offset + entry.num_bytes > size:
                raise truncated(path, key, entry, size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = entry.num_bytes // entry.dtype.itemsize
        flat = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)

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
            return parse_object(path.read_bytes(), each_name_once=file == _INDEX)
        except ValueError as exc:
            raise ModelError(f"{path} is not valid JSON ({exc}): fetch it again") from exc
        except OSError as exc:
            raise unreadable(path, exc) from exc


class _Folder:
    """A checkpoint in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name

    def locate(self, file: str) -> Path | None:
        path = self.folder / file
        if not path.is_file():
            return None
        check_link(path)
        return path

    def describe(self, file: str) -> str:
        return str(self.folder / file)

    def why_no_config(self) -> str:
        if not any(self.folder.iterdir()):
            return f"{self.folder} is empty: --model wants a folder with config.json and weights"
        return f"{self.folder} holds no config.json: it is not a Hugging Face checkpoint"

    def why_no_weights(self) -> str:
        pickled = sorted(it.name for it in self.folder.glob("*.bin"))
        if pickled:
            return _pickled(str(self.folder), pickled[0])
        return (
            f"{self.folder} holds neither {_SINGLE} nor {_INDEX}: "
            "the weights are missing, fetch the checkpoint again"
        )


class _Hub:
    """A checkpoint named by its hub id; files come from the hub cache, or are downloaded to it."""

    def __init__(self, repo: str) -> None:
        self.repo, self.name = repo, repo
        self._revision: str | None = None
        self._unreachable = False
        config = self.locate("config.json")
        if config is None:
            raise ModelError(self.why_no_config())
        self.folder = config.parent
        # All files of one commit, even if the hub moves on while this runs.
        if self.folder.parent.name == "snapshots":
            self._revision = self.folder.name

    def locate(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            path = Path(hf_hub_download(self.repo, file, revision=self._revision))
            check_link(path)
            return path
        except LocalEntryNotFoundError:  # not in the cache, and the hub was not asked or is away
            self._unreachable = True
            return None
        except EntryNotFoundError:
            return None
        except HFValidationError as exc:
            raise ModelError(
                f"--model {self.repo!r} is neither a folder nor a hub id like 'org/name'"
            ) from exc
        except (HfHubHTTPError, OSError) as exc:
            reason = str(exc).splitlines()[0]
            raise ModelError(f"{file} of {self.repo} could not be downloaded: {reason}") from exc

    def describe(self, file: str) -> str:
        return f"{file} of {self.repo}"

    def why_no_config(self) -> str:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        where = "on the hub"
        if HF_HUB_OFFLINE:
            where = "in the hub cache (HF_HUB_OFFLINE is set)"
        elif self._unreachable:
            where = "in the hub cache, and the hub cannot be reached"
        return f"--model {self.repo!r} is no folder here, and no such model was found {where}"

    def why_no_weights(self) -> str:
        if self.locate("pytorch_model.bin") or self.locate("pytorch_model.bin.index.json"):
            return _pickled(self.repo, "pytorch_model.bin")
        return f"{self.repo} has no safetensors weights in the hub cache or on the hub"


def _find(model: str | None) -> _Folder | _Hub:
    if model is None:
        return _Folder(DEMO_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        return _Folder(path)
    if path.exists():
        raise ModelError(
            f"--model {model} is a file: name the folder that holds config.json and the weights"
        )
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ModelError(f"--model {model}: there is no such folder")
    return _Hub(model)


def _hole(copy: StagedCopy, key: str) -> ModelError:
    return ModelError(
        f"{copy.folder} is a copy of layers {copy.layers[0]}:{copy.layers[1]} of {copy.name}, "
        f"without tensor {key!r}: point --model at the whole checkpoint"
    )


def check_link(path: Path) -> None:
    """Refuse a link that leads out of its folder to anything but the hub cache's own files.

    A folder that came from elsewhere may have a link to any file that its reader can read.

    Raises:
        ModelError: names the link and where it leads.
    """
    if not path.is_symlink():
        return
    real, folder = path.resolve(), path.parent.resolve()
    is_blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    own_blobs = (folder.parent.parent / "blobs").resolve()  # of a snapshot in the hub cache
    is_own_blob = folder.parent.name == "snapshots" and real.is_relative_to(own_blobs)
    if not (real.is_relative_to(folder) or is_blob or is_own_blob):
        raise ModelError(
            f"{path} is a link to {real}, outside of the checkpoint's folder: put the file itself "
            "there if you trust it"
        )


def _check_json_size(path: Path) -> None:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ModelError(
            f"{path} has {size} bytes, where {_MAX_JSON_BYTES} are the most: fetch it again"
        )


def truncated(path: Path, key: str, entry: TensorEntry, size: int) -> ModelError:
    """What to say of a file that ends before one of its tensors does."""
    return ModelError(
        f"{path} is truncated: tensor {key!r} needs bytes {entry.offset} to "
        f"{entry.offset + entry.num_bytes}, the file has {size}; fetch it again"
    )


def _pickled(where: str, file: str) -> str:
    return (
        f"{where} holds {file} but no safetensors: pickled weights are never loaded; convert them "
        "where you trust them, with transformers: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def _checked_weight_map(index: dict[str, Any], name: str) -> dict[str, str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelError(f"{_INDEX} of {name} has no weight_map: fetch it again")
    for key, file in files.items():
        where = f"{_INDEX} of {name} puts {shown(key)} into {shown(file)}"
        # A name from a checkpoint must not lead out of its folder.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise ModelError(f"{where}: not a plain file name")
        if not file.endswith(".safetensors"):
            raise ModelError(f"{where}, which is not a safetensors file")
        if not is_printable(file) or not is_printable(key):
            raise ModelError(f"{where}: a name that nobody can read or write; fetch it again")
    return files


def read_tensor(
    path: Path,
    key: str,
    entry: TensorEntry,
    progress: Progress | None = None,
    buffer: Tensor | None = None,
) -> Tensor:
    """Read one tensor of a safetensors file, and nothing else; into a buffer, if there is one.

    Raises:
        ModelError: the file cannot be read, or ends before the tensor does; names both.
    """
    done = 0
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if entry.offset + entry.num_bytes > size:  # before memory is taken for it
            raise truncated(path, key, entry, size)
        if buffer is None:
            data = torch.empty(entry.num_bytes, dtype=torch.uint8)
        else:
            data = buffer[: entry.num_bytes]
        view = data.numpy().data
        file.seek(entry.offset)
        while done < entry.num_bytes:
            try:
                count = file.readinto(view[done : done + _READ_BYTES])
            except OSError as exc:
                raise unreadable(path, exc) from exc
            if not count:
                raise truncated(path, key, entry, os.fstat(file.fileno()).st_size)
            done += count
            if progress is not None:
                progress(count)
    return data.view(entry.dtype).view(entry.shape)


def read_header(path: Path, file: str) -> dict[str, TensorEntry]:
    """The tensors that one safetensors file announces, checked against the format's rules.

    Format: 8 bytes little-endian header length, JSON header, data
    (https://github.com/huggingface/safetensors#format).
    """
    try:
        size, length, text = _read_start(path)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if text is None:
        raise ModelError(
            f"{path} is not a safetensors file, or is truncated in its header: "
            f"{size} bytes, a header of {length} announced; fetch it again"
        )
    try:
        header = parse_object(text, each_name_once=True)
    except ValueError as exc:
        raise ModelError(f"{path} has a damaged header ({exc}): fetch it again") from exc
    header.pop("__metadata__", None)
    entries = {key: _entry(path, file, key, said, 8 + length) for key, said in header.items()}
    _check_apart(path, entries)
    return entries


def _read_start(path: Path) -> tuple[int, int, bytes | None]:
    """A file's size, its header's length, and the header if the file is long enough for it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            return size, length, None
        return size, length, file.read(length)


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as exc:
        raise unreadable(path, exc) from exc


def _entry(path: Path, file: str, key: str, said: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {shown(key)}"
    if not is_printable(key):
        raise ModelError(f"{where} has a name that nobody can read or write: fetch it again")
    try:
        dtype, shape, (start, stop) = said["dtype"], said["shape"], said["data_offsets"]
        is_readable = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_AXES
        is_readable = is_readable and all(type(it) is int for it in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        is_readable = False
    if not is_readable:
        raise ModelError(f"{where} has an unreadable entry ({shown(said)}): fetch it again")
    if dtype not in _DTYPES:
        raise ModelError(f"{where} is of {shown(dtype)}, which is no type of numbers known here")
    is_bounded = 0 <= start <= stop <= _MAX_BYTES and all(0 <= it <= _MAX_BYTES for it in shape)
    if not is_bounded or stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise ModelError(
            f"{where} of shape {shown(shape)} {dtype} does not fit its bytes "
            f"{shown(start)} to {shown(stop)}: the file is damaged, fetch it again"
        )
    return TensorEntry(file, _DTYPES[dtype], tuple(shape), data_start + start, stop - start)


def _check_apart(path: Path, entries: dict[str, TensorEntry]) -> None:
    """See that no byte belongs to two tensors."""
    in_order = sorted(
        (it for it in entries.items() if it[1].num_bytes), key=lambda it: it[1].offset
    )
    for (first, one), (second, other) in pairwise(in_order):
        if one.offset + one.num_bytes > other.offset:
            raise ModelError(
                f"{path}: tensors {first!r} and {second!r} lie in the same bytes: the file is "
                "damaged, fetch it again"
            )
