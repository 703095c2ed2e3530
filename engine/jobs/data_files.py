"""Read rows out of data files: .txt, .jsonl, .json, .csv and .parquet.

A row is a mapping of column to value, and knows its file and line, so that whoever finds a fault
in it can say where. Knows formats; what columns mean stands in `engine.jobs.shapes`, which files
belong together in `engine.jobs.data_places`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from engine.jobs.rows import DataError, Place, Row, shown

# A cell of a CSV file may be a whole program; Python's own limit is 128 KiB.
MAX_CSV_CELL: Final = 256 * 2**20
PARQUET_ROWS: Final = 1024  # read at once


def read_rows(path: Path, *, text_per: str = "line") -> Iterator[tuple[Place, Row]]:
    """All rows of one file, in order; blank lines are no rows.

    Args:
        text_per: "line" or "file", what one text of a .txt file is.
    Raises:
        DataError: the file is not there, is of no known kind, or a row cannot be read.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: its name must end in one of {', '.join(READERS)}.")
    try:
        if read is _read_text and text_per == "file":
            yield from _read_whole_text(path)
        else:
            yield from read(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}.") from exc


def _read_text(path: Path) -> Iterator[tuple[Place, Row]]:
    for place, text in _lines(path):
        yield place, {"text": text}


def _read_whole_text(path: Path) -> Iterator[tuple[Place, Row]]:
    place = Place(str(path), None)
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise Place(str(path), line).bad(_not_utf8(raw, exc)) from exc
    yield place, {"text": text.replace("\r\n", "\n").strip("\n")}


def _read_jsonl(path: Path) -> Iterator[tuple[Place, Row]]:
    for place, text in _lines(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise place.bad(f"not JSON ({_reason(exc)}): {shown(text)}") from exc
        yield place, _checked_object(place, row)


def _read_json(path: Path) -> Iterator[tuple[Place, Row]]:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return
    try:
        content = json.loads(raw)
    except UnicodeDecodeError as exc:
        raise DataError(
            f"{path}: byte {exc.start + 1} is not UTF-8: save the file as UTF-8."
        ) from exc
    except (ValueError, RecursionError) as exc:
        if isinstance(exc, json.JSONDecodeError) and exc.msg == "Extra data":
            yield from _read_jsonl(path)  # an object a line, under the other name
            return
        line = getattr(exc, "lineno", None)
        raise Place(str(path), line).bad(f"not JSON ({_reason(exc)}).") from exc
    items = content
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) != 1 or _has_known_column(content):
            items = [content]
        else:
            items = next(iter(lists.values()))
    if not isinstance(items, list):
        raise DataError(f"{path} holds {shown(content)}: it takes a list of objects.")
    for number, row in enumerate(items, start=1):
        place = Place(str(path), number, "item")
        yield place, _checked_object(place, row)


def _has_known_column(content: Row) -> bool:
    """Whether an object is one sample with a list in it, not a list of samples with a name."""
    return any(key in content for key in ("messages", "conversations", "input_ids"))


def _read_csv(path: Path) -> Iterator[tuple[Place, Row]]:
    csv.field_size_limit(MAX_CSV_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        at = 1
        try:
            for cells in reader:
                place, at = Place(str(path), at), reader.line_num + 1
                if not cells:
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    continue
                if len(cells) != len(header):
                    raise place.bad(
                        f"{len(cells)} cells under {len(header)} columns ({', '.join(header)}): "
                        'put texts with commas or line breaks into "quotes".'
                    )
                yield place, dict(zip(header, cells, strict=True))
        except csv.Error as exc:
            raise Place(str(path), at).bad(f"not CSV ({exc}).") from exc
        except UnicodeDecodeError as exc:
            raise Place(str(path), at).bad(
                "at or behind this line a byte is not UTF-8: save the file as UTF-8."
            ) from exc


def _read_parquet(path: Path) -> Iterator[tuple[Place, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as exc:
        raise DataError(
            f"{path}: parquet files are read with pyarrow, which is not installed: "
            "pip install 'comboio[finetune]'."
        ) from exc
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(path), number, "row"), row
    except ArrowException as exc:
        raise DataError(f"{path} is not a parquet file that can be read ({_reason(exc)}).") from exc


def _lines(path: Path) -> Iterator[tuple[Place, str]]:
    """Every line that is not blank. Lines end at LF or CR LF, nowhere else."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            place = Place(str(path), number)
            raw = raw.removesuffix(b"\n").removesuffix(b"\r")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as exc:
                raise place.bad(_not_utf8(raw, exc)) from exc
            if text.strip():
                yield place, text


def _checked_object(place: Place, row: object) -> Row:
    if not isinstance(row, dict):
        raise place.bad(f'{shown(row)} is no object: write {{"text": ...}}, or another shape.')
    return row


def _not_utf8(raw: bytes, exc: UnicodeDecodeError) -> str:
    start = exc.start - (raw.rfind(b"\n", 0, exc.start) + 1)
    byte = f"byte {start + 1} of the line ({raw[exc.start]:#04x})"
    return f"{byte} is not UTF-8: save the file as UTF-8."


def _reason(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__


READERS: Final[dict[str, Callable[[Path], Iterator[tuple[Place, Row]]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
