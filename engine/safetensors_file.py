"""One safetensors file: its header, checked against the format's rules, and single tensors of it.

Of a tensor only its own bytes are read, and before memory is taken for them the file must be long
enough. Nothing is ever unpickled. Knows no checkpoint; which tensors lie in which file is
`engine.checkpoint`'s.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.copying import unreadable
from engine.json_file import is_printable, parse_object, shown
from proto.errors import ModelError

# The safetensors format allows headers up to 100 MB.
_MAX_HEADER_BYTES: Final = 100_000_000
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


def map_tensor(path: Path, key: str, entry: TensorEntry) -> Tensor:
    """One tensor as a private mapping of its file: pages are read as they are touched.

    Raises:
        ModelError: the file ends before the tensor does; names both.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if entry.offset + entry.num_bytes > size:
            raise truncated(path, key, entry, size)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    count = entry.num_bytes // entry.dtype.itemsize
    flat = torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.offset)
    return flat.view(entry.shape)


def _opened(path: Path) -> FileIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as exc:
        raise unreadable(path, exc) from exc


def truncated(path: Path, key: str, entry: TensorEntry, size: int) -> ModelError:
    """What to say of a file that ends before one of its tensors does."""
    return ModelError(
        f"{path} is truncated: tensor {key!r} needs bytes {entry.offset} to "
        f"{entry.offset + entry.num_bytes}, the file has {size}; fetch it again"
    )
