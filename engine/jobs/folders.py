"""Write a folder whole or not at all, and keep two runs out of one folder.

A folder is filled under another name beside its place, brought to disk, and renamed: whoever looks
sees the old one or the new one, also after a power cut. Knows nothing of what is in it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from proto.errors import Error, UsageError

PARTIAL: Final = ".partial-"  # what is being written; left over by a run that was killed
REPLACED: Final = ".replaced-"
LOCK: Final = ".lock"
GB: Final = 10**9


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder in place that `fill` writes; what was there before is replaced.

    Raises:
        Error: it cannot be written, with the disk's state; what was there before is untouched.
    """
    partial = target.with_name(f"{PARTIAL}{target.name}")
    replaced = target.with_name(f"{REPLACED}{target.name}")
    with translated(target):
        try:
            if replaced.exists() and not target.exists():
                replaced.rename(target)  # killed here the last time
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            fill(partial)
            _bring_to_disk(partial)
            shutil.rmtree(replaced, ignore_errors=True)
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
            _sync(target.parent)
        except BaseException:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def write_file(target: Path, content: bytes | str) -> None:
    """The same for a file.

    Raises:
        Error: it cannot be written; what was there before is untouched.
    """
    partial = target.with_name(f"{PARTIAL}{target.name}")
    data = content.encode() if isinstance(content, str) else content
    with translated(target):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written, and bring back what it was replacing."""
    for path in folder.glob(f"{REPLACED}*"):
        target = path.with_name(path.name.removeprefix(REPLACED))
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def translated(target: Path) -> Iterator[None]:
    """What goes wrong on a disk, in one sentence.

    Raises:
        Error: for an OSError, or safetensors' own words for one.
    """
    try:
        yield
    except OSError as exc:
        raise Error(_disk_sentence(target, exc.errno, exc.strerror or str(exc))) from exc
    except Exception as exc:
        if type(exc).__name__ != "SafetensorError":
            raise
        is_full = "No space left" in str(exc)
        raise Error(_disk_sentence(target, errno.ENOSPC if is_full else None, str(exc))) from exc


def _disk_sentence(target: Path, code: int | None, reason: str) -> str:
    if code in (errno.ENOSPC, errno.EDQUOT):
        what = "the disk is full" if code == errno.ENOSPC else "the disk quota is used up"
        return f"{target} cannot be written, {what} ({_free(target)})"
    return f"{target} cannot be written: {reason}"


def _free(target: Path) -> str:
    folder = next((it for it in target.parents if it.is_dir()), None)
    if folder is None:
        return "unknown space"
    return f"{shutil.disk_usage(folder).free / GB:.2f} GB free"


def _bring_to_disk(folder: Path) -> None:
    mode = 0o666 & ~_umask()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)  # safetensors keeps its files to the user alone
        _sync(path)
    _sync(folder)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems: not for folders
            raise
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else trains into this folder meanwhile; the lock ends with the process.

    Raises:
        UsageError: another process does.
    """
    import fcntl

    with translated(folder):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--save-dir {folder}: another run writes there now; end it, or name another one."
            ) from None
        except OSError:
            pass  # a network file system without locks: it has to do without
        yield
    finally:
        os.close(handle)
