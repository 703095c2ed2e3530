"""Where a batch's results go, row by row, so that nothing that was computed is lost.

To a file: every finished row is appended at once to `FILE.partial`; an interrupted batch reads it
again and skips the rows that are there. When all rows are, `FILE` is written in input order, in
one go, and the partial one is removed. To stdout or a device: in input order, each row as soon as
the ones before it are done; nothing is remembered.

The partial file's first line says what made it (model, options); every other one is
{"key": ..., "result": {...}}, where the key is a digest of the prompt and its options. Knows
neither pipeline nor model.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Protocol, TextIO

from manager.output import TextWriter
from manager.prompts import Row
from proto.errors import Error, UsageError

PARTIAL_FORMAT: Final = 1
READ_BYTES: Final = 1024 * 1024

Result = dict[str, Any]


class ResultsLost(Error):
    """A place for results that takes no more: full, or gone."""


class Results(Protocol):
    """A place for results; a context manager."""

    num_failed: int  # rows with an error, resumed ones included
    num_changed: int  # rows that were kept and whose prompts are not there any more

    def begin(self, made_by: Mapping[str, Any]) -> None:
        """Rows follow; `made_by` is what all texts depend on, for a later resumption.

        After `pause` it may be called again, to go on with the rows that are not done.
        """

    @property
    def done(self) -> frozenset[int]:
        """Indices of rows that need not run."""

    def add(self, row: Row, result: Result) -> None:
        """A row is finished, well or badly."""

    async def pause(self) -> None:
        """The batch ends here, before its last row."""

    async def finish(self) -> None:
        """All rows are there."""

    @property
    def kept(self) -> str:
        """What became of the finished rows and how to go on, for a sentence about a batch's end."""

    def __enter__(self) -> Results: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_results(path: Path | None, rows: Sequence[Row], *, overwrite: bool) -> Results:
    """A place for the results of these rows.

    Args:
        path: None is stdout.
        overwrite: begin anew, whatever is there.
    Raises:
        UsageError: results are there already; another batch writes there; no file can be made.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return StreamedResults(path, len(rows))
    return ResultsFile(path, rows, overwrite=overwrite)


class ResultsFile:
    """Results in a file, resumable."""

    def __init__(self, path: Path, rows: Sequence[Row], *, overwrite: bool) -> None:
        self.path = Path(os.path.realpath(path))  # a link stays one when the file is replaced
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.num_failed = 0
        self.num_changed = 0
        self._rows, self._overwrite = rows, overwrite
        self._places: dict[int, tuple[int, int]] = {}  # row -> (offset, bytes) in the partial file
        self._header: Mapping[str, Any] | None = None  # of the partial file that was there
        self._end = 0  # of the last whole line
        self._has_begun_anew = self._is_whole = False
        self._check_path()
        self._file = self._open()
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    @property
    def done(self) -> frozenset[int]:
        return frozenset(self._places)

    @property
    def kept(self) -> str:
        if self._is_whole:
            return f"all {len(self._rows)} results are in {self.path}"
        if not self._places:
            return "no row was finished"
        return (
            f"{len(self._places)} of {len(self._rows)} rows are kept in {self.partial}: "
            f"run the same command again{' without --overwrite' * self._overwrite} to go on"
        )

    def begin(self, made_by: Mapping[str, Any]) -> None:
        """Check that what is there was made by the same, or write down what makes it.

        Raises:
            UsageError: another model or other options made what is there.
            ResultsLost: nothing can be written there.
        """
        made_by = json.loads(json.dumps(made_by))  # as it is read back
        if self._header is None:
            self._file.truncate(0)
            self._has_begun_anew = True
            replaces = self._overwrite and self.path.exists()
            header = {"partial": PARTIAL_FORMAT, "replaces": replaces, "made_by": made_by}
            self._append(header)
            self._header = header  # whoever begins again, after a loss, goes on
            return
        before = self._header["made_by"]
        for name in {**made_by, **before}:
            if before.get(name) != made_by.get(name):
                raise UsageError(
                    f"{self.partial} was begun with {name} {json.dumps(before.get(name))}, now it "
                    f"is {json.dumps(made_by.get(name))}: run it as before to go on, or pass "
                    "--overwrite to begin anew."
                )

    def add(self, row: Row, result: Result) -> None:
        """Append a row, at once and whole.

        Raises:
            ResultsLost: it cannot be written; those before it are kept.
        """
        self._places[row.index] = self._append({"key": row.key, "result": result})
        self.num_failed += result["error"] is not None

    async def pause(self) -> None:
        pass  # every row was written when it was added

    async def finish(self) -> None:
        """Write the file in input order and remove the partial one.

        Raises:
            ResultsLost: it cannot be written; all rows are kept in the partial one.
        """
        writing = self.path.with_name(self.path.name + ".writing")
        try:
            with writing.open("wb") as out:
                for line in self._lines_in_order():
                    out.write(line)
                out.flush()
                os.fsync(out.fileno())
            writing.replace(self.path)
        except OSError as exc:
            writing.unlink(missing_ok=True)
            raise ResultsLost(f"cannot write {self.path}: {exc.strerror}") from exc
        self.partial.unlink(missing_ok=True)
        self._is_whole = True

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_empty = os.fstat(self._file.fileno()).st_size == 0
        if not self._places and (self._has_begun_anew or is_empty):
            self.partial.unlink(missing_ok=True)
        self._file.close()

    # --- opening -----------------------------------------------------------------------------

    def _check_path(self) -> None:
        if self.path.is_dir():
            raise UsageError(f"--output {self.path} is a folder: name a file.")
        if not self.path.parent.is_dir():
            raise UsageError(f"--output {self.path}: there is no folder {self.path.parent}.")
        if self.path.exists() and not self.partial.exists() and not self._overwrite:
            raise _AlreadyThere(self.path)

    def _open(self) -> IO[bytes]:
        try:
            file = self.partial.open("a+b", buffering=0)
        except OSError as exc:
            raise UsageError(f"cannot write {self.partial}: {exc.strerror}.") from exc
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                f"another batch is writing {self.partial}: wait for it, or name another --output."
            ) from None
        except OSError:
            pass  # a file system without locks
        return file

    def _read(self) -> None:
        """Find the rows that are there. A last line that is not whole is dropped."""
        if self._overwrite:
            return  # it goes when the first row is about to run, not before
        unclaimed = defaultdict[str, list[int]](list)
        for row in reversed(self._rows):
            unclaimed[row.key].append(row.index)  # the first of equal rows is claimed first
        for number, (offset, line) in enumerate(self._whole_lines(), start=1):
            values = self._parse(number, line)
            if number == 1:
                self._header = values
            elif unclaimed[values["key"]]:
                self._places[unclaimed[values["key"]].pop()] = (offset, len(line))
                self.num_failed += values["result"].get("error") is not None
            else:
                self.num_changed += 1
        self._file.truncate(self._end)
        if self.path.exists() and not (self._header or {}).get("replaces"):
            raise _AlreadyThere(self.path)

    def _whole_lines(self) -> Iterator[tuple[int, bytes]]:
        with self.partial.open("rb", buffering=READ_BYTES) as file:
            for line in file:
                if line.endswith(b"\n"):
                    offset, self._end = self._end, self._end + len(line)
                    yield offset, line

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
            if number == 1 and values["partial"] == PARTIAL_FORMAT:
                return {"replaces": values["replaces"], "made_by": dict(values["made_by"])}
            return {"key": str(values["key"]), "result": dict(values["result"])}
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f"{self.partial}:{number} is not what a batch writes: pass --overwrite to begin "
                "anew, or name another --output."
            ) from None

    # --- writing -----------------------------------------------------------------------------

    def _append(self, values: Mapping[str, Any]) -> tuple[int, int]:
        """(offset, bytes) of a new line."""
        line = memoryview(_line(values))
        offset, written = self._end, 0
        try:
            while written < len(line):
                written += os.write(self._file.fileno(), line[written:])
        except OSError as exc:
            self._drop_torn_line()
            raise ResultsLost(f"cannot write {self.partial}: {exc.strerror}") from exc
        self._end = offset + len(line)
        return offset, len(line)

    def _drop_torn_line(self) -> None:
        try:
            self._file.truncate(self._end)
        except OSError:
            pass  # then the next run drops it

    def _lines_in_order(self) -> Iterator[bytes]:
        with self.partial.open("rb") as file:
            for row in self._rows:
                offset, num_bytes = self._places[row.index]
                file.seek(offset)
                result = json.loads(file.read(num_bytes))["result"]
                # A row may have moved in the file of prompts since it ran.
                yield _line({**result, "index": row.index, "id": row.id})


class _AlreadyThere(UsageError):
    """Results are at the path that was named."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(
            f"{path} is there already: pass --overwrite to replace it, or name another --output."
        )


class StreamedResults:
    """Results on stdout or a device, in input order."""

    def __init__(self, path: Path | None, num_rows: int) -> None:
        self._name = "stdout" if path is None else str(path)
        self._num_rows = num_rows
        self.num_failed = self.num_changed = 0
        self._early: dict[int, bytes] = {}  # rows that wait for those before them
        self._added = set[int]()
        self._next = 0
        self._stream: TextIO = sys.stdout if path is None else _open_device(path)
        self._writer: TextWriter | None = None

    @property
    def done(self) -> frozenset[int]:
        return frozenset(self._added)

    @property
    def kept(self) -> str:
        return (
            f"{self._next} of {self._num_rows} rows were written to {self._name}; "
            "with --output FILE a batch can go on where it ended"
        )

    def begin(self, made_by: Mapping[str, Any]) -> None:
        self._writer = TextWriter(self._stream)

    def add(self, row: Row, result: Result) -> None:
        """Write the row when its turn comes.

        Raises:
            BrokenPipeError: nobody reads any more.
            ResultsLost: an earlier one could not be written.
        """
        self.num_failed += result["error"] is not None
        self._added.add(row.index)
        self._early[row.index] = _line(result)
        while (line := self._early.pop(self._next, None)) is not None:
            assert self._writer is not None
            try:
                self._writer.write(line.decode())
            except OSError as exc:
                raise self._unwritable(exc) from exc
            self._next += 1

    async def pause(self) -> None:
        if self._writer is not None:
            try:
                await self._writer.close()
            except OSError:
                pass  # why the batch ends is said already

    async def finish(self) -> None:
        assert self._writer is not None
        try:
            await self._writer.close()
        except OSError as exc:
            raise self._unwritable(exc) from exc

    def _unwritable(self, exc: OSError) -> OSError | ResultsLost:
        if isinstance(exc, BrokenPipeError):
            return exc
        return ResultsLost(f"cannot write the results to {self._name}: {exc.strerror}")

    def __enter__(self) -> StreamedResults:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not sys.stdout:
            try:
                self._stream.close()
            except OSError:
                pass  # what could not be written has been said


def _open_device(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"--output {path} cannot be written: {exc.strerror}.") from exc


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False) + "\n").encode()
