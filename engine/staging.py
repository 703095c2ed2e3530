"""Bring a section's own bytes of a checkpoint to a folder of this node, before it is loaded.

For clusters whose shared file system is slow, or where many workers start at once. The copy is a
checkpoint folder: every file that the section needs has its name, its full size and its header, but
only the section's tensors are copied, and the rest is a hole. A marker (`engine.staged_copy`) says
what is there; it names a file's bytes only once they are on the disk, so a copy that was
interrupted goes on with the next file. Copies stay, and are used again:

    DIR/<model>-<fingerprint>/layers-0-16/        and beside it layers-0-16.lock

Runs on torch's thread, but imports no torch, so that a bad folder is refused before that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from engine.copying import FileChanged, copy_ranges
from engine.slice import Slice, range_bytes
from engine.staged_copy import Range, merged, sync_folder
from proto.errors import Error, ModelError, UsageError

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

_LOOK_AGAIN_S: Final = 0.2  # whether another worker's copy is finished
_BLOCK_BYTES: Final = 4096  # what a range's two ends are rounded to on most file systems
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Watch(Protocol):
    """Whoever wants to know how it goes. Any of these may raise to give up."""

    def waiting(self, folder: Path) -> None:
        """Another worker copies the same slice; called several times a second."""

    def copying(self, done_bytes: int, total_bytes: int) -> None:
        """So much is copied; called with 0 before the first byte."""

    def staged(self, done: Staged) -> None:
        """The slice is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """How a slice came to be here."""

    folder: Path
    slice_bytes: int  # all of it
    copied_bytes: int  # by this call; 0: the copy was there
    elapsed_s: float  # of copying, until it was on the disk
    is_same_disk: bool  # the original lies on the same file system


class Staging:
    """A folder for copies, shared by all workers of this node."""

    def __init__(self, root: Path, watch: Watch) -> None:
        """Make the folder where there is none.

        Raises:
            UsageError: it cannot be made, or is none.
        """
        self._root, self._watch = root, watch
        try:
            root.mkdir(parents=True, exist_ok=True)
        except FileExistsError as exc:
            raise UsageError(f"--stage-to {root} is a file: name a folder") from exc
        except OSError as exc:
            raise _unwritable(root, exc) from exc

    @contextmanager
    def copy_of(self, checkpoint: Checkpoint, keys: Iterable[str], layers: Range) -> Iterator[None]:
        """Bring these tensors here; inside the block, `checkpoint` reads from the copy.

        No other worker changes the copy before the block ends.

        Args:
            checkpoint: the original.
            keys: the tensors that will be read.
            layers: the section, which names the copy.
        Raises:
            ModelError: the original is damaged, or changed while it was copied.
            UsageError: there is no room, or the folder cannot be written.
            Error: the disk became full on the way; nothing is left there.
        """
        wanted = Slice(checkpoint, keys, layers)
        folder = self._folder(checkpoint, layers)
        copied_bytes, started_s = 0, time.monotonic()
        with self._lock(folder) as lock:
            while (copy := wanted.find_in(folder)) is None:
                lock(fcntl.LOCK_EX)
                if wanted.find_in(folder) is None:  # nobody else has brought it since
                    started_s = time.monotonic()
                    copied_bytes = self._fill(folder, wanted)
                lock(fcntl.LOCK_SH)  # lets others in for a moment, so look again
            self._watch.staged(
                Staged(
                    folder=folder,
                    slice_bytes=wanted.num_bytes,
                    copied_bytes=copied_bytes,
                    elapsed_s=time.monotonic() - started_s,
                    is_same_disk=wanted.is_on_disk_of(folder),
                )
            )
            with checkpoint.reading_from(copy):
                yield

    def _folder(self, checkpoint: Checkpoint, layers: Range) -> Path:
        """Where this slice's copy belongs, below a folder that is ours alone.

        Raises:
            UsageError: somebody else made that folder: the weights in it may be anything.
        """
        name = re.sub(r"[^A-Za-z0-9._-]+", "--", checkpoint.name).strip(".-")[:80] or "model"
        ours = self._root / f"{name}-{checkpoint.fingerprint[:12]}"
        try:
            ours.mkdir(mode=0o700, exist_ok=True)  # not everybody may read the original
            is_ours = _is_ours(ours)
        except OSError as exc:
            raise _unwritable(ours, exc) from exc
        if not is_ours:
            raise UsageError(
                f"--stage-to {self._root}: {ours} was made by another user, and is not trusted: "
                "name a folder of your own"
            )
        return ours / f"layers-{layers[0]}-{layers[1]}"

    def _fill(self, folder: Path, wanted: Slice) -> int:
        """Copy what is not there yet; the bytes copied."""
        try:
            return self._copy_missing(folder, wanted)
        except FileChanged as exc:
            shutil.rmtree(folder, ignore_errors=True)
            raise ModelError(
                f"{exc} changed while it was copied to {folder}: start the worker again "
                "when nobody writes to the model any more"
            ) from exc
        except OSError as exc:  # of writing; what goes wrong in reading is a ModelError
            if exc.errno not in _FULL:
                raise _unwritable(Path(exc.filename or folder), exc) from exc
            shutil.rmtree(folder, ignore_errors=True)
            raise Error(
                f"--stage-to {self._root} became full while {wanted.title} "
                f"({_mb(wanted.num_bytes)} MB) were copied there, and what was copied is deleted "
                "again: make room, or name a folder on another disk"
            ) from exc

    def _copy_missing(self, folder: Path, wanted: Slice) -> int:
        folder.mkdir(mode=0o700, exist_ok=True)
        kept = wanted.still_good(folder)
        wanted.as_copy(folder, kept).save()  # before anything else of it is overwritten
        for name in wanted.files.keys() - kept.keys():
            (folder / name).unlink(missing_ok=True)
        missing = {name: ranges for name, ranges in wanted.missing(kept).items() if ranges}
        self._check_room(folder, wanted, missing.values())
        count = self._counter(sum(map(range_bytes, missing.values())))
        for name, ranges in missing.items():
            version = wanted.files[name]
            copy_ranges(wanted.paths[name], folder / name, version, ranges, count)
            held = kept[name].ranges if name in kept else ()
            kept[name] = replace(version, ranges=merged([*held, *ranges]))
            wanted.as_copy(folder, kept).save()
        sync_folder(folder.parent)
        wanted.check_unchanged(folder)
        return sum(map(range_bytes, missing.values()))

    def _check_room(
        self, folder: Path, wanted: Slice, missing: Iterable[tuple[Range, ...]]
    ) -> None:
        needed = sum(range_bytes(it) + 2 * _BLOCK_BYTES * len(it) for it in missing)
        free = shutil.disk_usage(folder).free
        if needed <= free:
            return
        older = sum(_disk_bytes(it) for it in self._root.glob("*/layers-*/*"))
        hint = f"delete older copies there ({_mb(older)} MB)" if older >= 10**6 else "make room"
        raise UsageError(
            f"--stage-to {self._root}: {wanted.title} need {_mb(needed)} MB there, and "
            f"{_mb(free)} MB are free: {hint}, or name a folder on another disk"
        )

    def _counter(self, total_bytes: int) -> Callable[[int], None]:
        """What adds up the bytes copied and shows them."""
        done_bytes = 0

        def count(num_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += num_bytes
            self._watch.copying(done_bytes, total_bytes)

        count(0)
        return count

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[Callable[[int], None]]:
        """Share a lock with the workers that want the same copy; gives what changes the lock.

        Whoever reads the copy shares it, whoever writes the copy has it alone. The operating system
        lets it go when the process ends, however it ends.
        """
        path = folder.with_name(f"{folder.name}.lock")
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as exc:
            raise _unwritable(path, exc) from exc

        def lock(kind: int) -> None:
            while True:
                try:
                    return fcntl.flock(number, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._watch.waiting(folder)
                    time.sleep(_LOOK_AGAIN_S)
                except OSError as exc:
                    raise UsageError(
                        f"--stage-to: {path} cannot be locked ({exc.strerror}): "
                        "name a folder on a disk of this machine"
                    ) from exc

        try:
            lock(fcntl.LOCK_SH)
            yield lock
        finally:
            os.close(number)


def _is_ours(folder: Path) -> bool:
    """Whether this user, or root, made a folder."""
    owner = folder.lstat().st_uid
    if owner in (os.geteuid(), 0):
        return True
    # Some file systems give all files one owner: then a file made now has the same.
    probe = folder / f"owner-{os.getpid()}"
    number = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return os.fstat(number).st_uid == owner
    finally:
        os.close(number)
        probe.unlink()


def _disk_bytes(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:  # its worker has deleted it since
        return 0


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f}"


def _unwritable(path: Path, exc: OSError) -> UsageError:
    return UsageError(
        f"--stage-to: {path} cannot be written ({exc.strerror}): "
        "name a folder on a local disk that you can write to"
    )
