"""Keep packed weights on a disk, so that they are packed once.

One file holds what is packed of one decoder layer, or of what follows the last one. Its name is a
hash over everything that its bytes depend on: which tensors of which files, some of their bytes,
what is made of them, and the packed format. So nothing needs to be declared stale: what changed
has another name, and what is not used for long is deleted when room is needed. A file is written
under another name and renamed, and its checksum is looked at when it is read; what is damaged is
packed anew. Whatever goes wrong here costs time, and never a start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from engine.kernels.packed import LAYOUT_VERSION
from engine.packed_linear import Packed
from proto.errors import ModelError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.quantize import PackedParts
    from engine.weights import WeightPlan

log = logging.getLogger("comboio.engine")

DEFAULT_BYTES: Final = 20 * 2**30
_MAGIC: Final = b"comboio-packed-1\n"
_SUFFIX: Final = ".packed"
_UNFINISHED: Final = ".part"
_HEADER_BYTES: Final = 4096  # where the data begins; a page
_READ_BYTES: Final = 16 * 2**20
_SAMPLE_BYTES: Final = 4096  # of each tensor, at its start, middle and end
_SUM_WORDS: Final = 2**17  # of 8 bytes, that are added up to one number of the checksum
_STALE_S: Final = 3600.0  # an unfinished file is somebody's who is gone


class PackedCache:
    """A folder of packed weights, shared by all workers of one user."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def shelf(self, checkpoint: Checkpoint, plan: WeightPlan, packed: PackedParts) -> Shelf | None:
        """The files for what one stage packs; None where the folder cannot be used.

        Call it before anything is read: afterwards, tensors may come from a copy.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_uid not in (os.geteuid(), 0):
                _say("quantized weights are not kept: the folder is another user's", self.folder)
                return None
        except OSError as exc:
            _say("quantized weights are not kept", self.folder, reason=exc.strerror)
            return None
        sources = _Sources(checkpoint)
        units: dict[str, list[tuple[str, Packed]]] = {}
        for path, module in packed.modules.items():
            units.setdefault(_unit_of(path), []).append((path, module))
        books = []
        for modules in units.values():
            book = _book(self.folder, sorted(modules, key=lambda it: it[0]), plan, sources)
            if book is not None:
                books.append(book)
        return Shelf(self, books)

    def make_room(self, num_bytes: int, since_s: float) -> bool:
        """Delete what was not used for longest, until so much more fits.

        Args:
            since_s: what was used after this time stays.
        Returns:
            Whether there is room.
        """
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another worker has deleted it since
                seen = path.stat()
                if path.suffix == _SUFFIX:
                    files.append((seen.st_mtime, seen.st_size, path))
                elif path.suffix == _UNFINISHED and seen.st_mtime < time.time() - _STALE_S:
                    path.unlink()
        held = sum(size for _, size, _ in files)
        free = shutil.disk_usage(self.folder).free
        # Half of what the disk has for us and for others.
        limit = min(self.max_bytes, (free + held) // 2)
        stays = sum(size for used_s, size, _ in files if used_s >= since_s)
        if stays + num_bytes > limit:
            return False
        for _, size, path in sorted(files):
            if held + num_bytes <= limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            held -= size
        return True


@dataclass(slots=True)
class _Book:
    """One file, and the modules whose matrices are in it."""

    path: Path
    modules: Sequence[Packed]
    source_bytes: int  # that packing it anew reads
    is_here: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """The bytes of its matrices, in order."""
        return [it.data for module in self.modules for it in module.matrices()]

    @property
    def num_bytes(self) -> int:
        """Of all its matrices."""
        return sum(it.numel() for it in self.tensors)


@dataclass(slots=True)
class Shelf:
    """The files of one stage: those that are there, and those that are to be written."""

    cache: PackedCache
    books: list[_Book]
    opened_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        for book in self.books:
            book.is_here = _has_size(book)

    @property
    def num_bytes(self) -> int:
        """What `fetch` will read."""
        return sum(it.num_bytes for it in self.books if it.is_here)

    @property
    def source_bytes(self) -> int:
        """What need not be read of the checkpoint then."""
        return sum(it.source_bytes for it in self.books if it.is_here)

    def fetch(self, progress: Callable[[int], None]) -> int:
        """Fill the matrices of every file that is there and whole; the bytes of those."""
        for book in self.books:
            if not book.is_here:
                continue
            book.is_here = _read(book, progress)
            if book.is_here:
                for module in book.modules:
                    module.all_came()
        return self.num_bytes

    def store(self) -> None:
        """Write what was packed now."""
        missing = [it for it in self.books if not it.is_here]
        needed = sum(it.num_bytes + _HEADER_BYTES for it in missing)
        folder = self.cache.folder
        if not needed:
            return
        try:
            if not self.cache.make_room(needed, self.opened_s):
                _say("quantized weights are not kept: no room", folder, mb=f"{needed / 1e6:.1f}")
                return
            for book in missing:
                _write(book)
        except OSError as exc:
            _say("quantized weights are not kept", folder, reason=exc.strerror)
            return
        log.info("quantized weights kept", extra=_fields(folder=folder, mb=f"{needed / 1e6:.1f}"))


class _Sources:
    """What tells one version of a checkpoint's tensors from another."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._versions: dict[str, list[object]] = {}

    def version(self, key: str) -> list[object]:
        """Of one tensor: where it lies, in which version of the file, and a sample of its bytes."""
        entry = self._checkpoint.entry(key)
        path = self._checkpoint.locate(entry.file)
        if entry.file not in self._versions:
            self._versions[entry.file] = _file_version(path)
        places = {0, entry.num_bytes // 2, max(0, entry.num_bytes - _SAMPLE_BYTES)}
        sample = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for place in sorted(places):
                length = min(_SAMPLE_BYTES, entry.num_bytes - place)
                sample.update(os.pread(file.fileno(), length, entry.offset + place))
        shape = [key, str(entry.dtype), list(entry.shape), entry.offset]
        return [*self._versions[entry.file], *shape, sample.hexdigest()]

    def num_bytes(self, key: str) -> int:
        return self._checkpoint.entry(key).num_bytes


def _book(
    folder: Path,
    modules: Sequence[tuple[str, Packed]],
    plan: WeightPlan,
    sources: _Sources,
) -> _Book | None:
    """The file for some modules; None where they cannot be told from others' sources."""
    said: list[object] = [_MAGIC.decode(), LAYOUT_VERSION]
    source_bytes = 0
    try:
        for path, module in modules:
            for leaf in module.packed_leaves:
                recipe = plan.recipe(f"{path}.{leaf}")
                if recipe is None:
                    return None
                keys, how = recipe
                source_bytes += sum(map(sources.num_bytes, keys))
                said.append([leaf, how, [sources.version(key) for key in keys]])
            shapes = [[it.rows, it.cols, it.data.numel()] for it in module.matrices()]
            said.append([type(module).__name__, module.format, shapes])
    except (OSError, ModelError):  # reading it will say what is wrong
        return None
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:40]
    return _Book(folder / f"{name}{_SUFFIX}", [it for _, it in modules], source_bytes)


def _file_version(path: Path) -> list[object]:
    real = path.resolve()
    seen = real.stat()
    # The hub cache names its files by their content.
    if real.parent.name == "blobs":
        return [real.name, seen.st_size]
    return [seen.st_size, seen.st_mtime_ns]


def _unit_of(path: str) -> str:
    """The path of the decoder layer that a module is in; of others, the module's own."""
    words = path.split(".")
    number = next((at for at, word in enumerate(words) if word.isdigit()), None)
    return path if number is None else ".".join(words[: number + 1])


# --- the files ---------------------------------------------------------------------------------


def _has_size(book: _Book) -> bool:
    try:
        return book.path.stat().st_size == _HEADER_BYTES + book.num_bytes
    except OSError:
        return False


def _read(book: _Book, progress: Callable[[int], None]) -> bool:
    """Fill a file's matrices; False where it is damaged, and then it is deleted."""
    try:
        with book.path.open("rb", buffering=0) as file:
            header = file.read(_HEADER_BYTES)
            for tensor in book.tensors:
                if not _fill(file.readinto, tensor, progress):
                    raise ValueError
        if header != _header(book.path, book.tensors):
            raise ValueError
        os.utime(book.path)  # the time of its last use
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "damaged"
        _say("kept quantized weights cannot be used, and are made anew", book.path, reason=reason)
        with contextlib.suppress(OSError):
            book.path.unlink()
        return False
    return True


def _fill(
    readinto: Callable[[memoryview], int | None], tensor: Tensor, progress: Callable[[int], None]
) -> bool:
    at_hand = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
    view = at_hand.numpy().data
    done = 0
    while done < len(view):
        count = readinto(view[done : done + _READ_BYTES])
        if not count:
            return False
        done += count
        progress(count)
    if at_hand is not tensor:
        tensor.copy_(at_hand)
    return True


def _write(book: _Book) -> None:
    unfinished = book.path.with_suffix(f".{os.getpid()}{_UNFINISHED}")
    try:
        number = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(number, "wb", buffering=0) as file:
            tensors = [it.cpu() for it in book.tensors]
            parts: list[memoryview] = [memoryview(_header(book.path, tensors))]
            parts += [it.numpy().data for it in tensors]
            for part in parts:
                done = 0
                while done < len(part):
                    done += file.write(part[done:])
        os.replace(unfinished, book.path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _header(path: Path, tensors: Iterable[Tensor]) -> bytes:
    """The first page of a file: what it is, of which weights, and the checksum of the rest."""
    said = f"{path.stem}\n{_checksum(tensors)}\n"
    return (_MAGIC + said.encode()).ljust(_HEADER_BYTES, b"\0")


def _checksum(tensors: Iterable[Tensor]) -> str:
    """Against damage by accident: a hash over sums, so that it is as fast as memory."""
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.cpu().numpy()
        whole = len(data) // 8 * 8
        words = data[:whole].view(np.uint64)
        for start in range(0, len(words), _SUM_WORDS):
            digest.update(words[start : start + _SUM_WORDS].sum(dtype=np.uint64).tobytes())
        digest.update(data[whole:].tobytes())
    return digest.hexdigest()


def _say(event: str, path: Path, **values: object) -> None:
    log.warning(event, extra=_fields(path=path, **values))


def _fields(**values: object) -> dict[str, object]:
    """Key and value, as the log of whoever runs this shows them."""
    return {"fields": values}
