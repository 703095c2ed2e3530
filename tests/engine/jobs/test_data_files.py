"""Files of every kind become rows; what is wrong in one is said with file and line."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from engine.jobs.data_files import read_rows
from engine.jobs.rows import DataError


def rows(path, **settings):
    return [(str(place), dict(row)) for place, row in read_rows(path, **settings)]


def test_a_text_file_is_a_text_a_line_without_blank_ones(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\r\n\n  \nsecond\u2028half\n".encode())
    assert rows(path) == [
        (f"{path}:1", {"text": "first"}),
        (f"{path}:4", {"text": "second\u2028half"}),
    ]


def test_a_text_file_may_be_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\r\n\nsecond\n")
    assert rows(path, text_per="file") == [(str(path), {"text": "first\n\nsecond"})]


SAMPLES = [{"text": 'a, "b"\nc', "language": "Cuda"}, {"text": "é", "language": "C"}]


def write_as(kind, path):
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(it) + "\n" for it in SAMPLES))
    elif kind == ".json":
        path.write_text(json.dumps(SAMPLES, indent=1))
    elif kind == ".csv":
        path.write_text('text,language\r\n"a, ""b""\nc",Cuda\r\né,C\r\n')
    else:
        parquet.write_table(pyarrow.Table.from_pylist(SAMPLES), path)


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        (".jsonl", [":1", ":2"]),
        (".json", [": item 1", ": item 2"]),
        (".csv", [":2", ":4"]),
        (".parquet", [": row 1", ": row 2"]),
    ],
)
def test_every_kind_gives_the_same_rows(kind, places, tmp_path):
    path = tmp_path / f"data{kind}"
    write_as(kind, path)
    assert rows(path) == [
        (f"{path}{place}", sample) for place, sample in zip(places, SAMPLES, strict=True)
    ]


def test_a_json_file_may_name_its_list_or_hold_an_object_a_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": SAMPLES}))
    assert [row for _, row in rows(path)] == SAMPLES
    path.write_text("".join(json.dumps(it) + "\n" for it in SAMPLES))
    assert [row for _, row in rows(path)] == SAMPLES
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    assert len(rows(path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON \(Expecting value"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: \[1\] is no object"),
        (
            "a.jsonl",
            b'\n{"text": "\xff"}\n',
            r"a\.jsonl:2: byte 11 of the line \(0xff\) is not UTF",
        ),
        ("a.txt", b"x\ny\xc3\n", r"a\.txt:2: byte 2 of the line \(0xc3\) is not UTF-8"),
        ("a.json", b'[{"text": "x"},\n oops]', r"a\.json:2: not JSON"),
        ("a.json", b'"x"', r'a\.json holds "x": it takes a list'),
        ("a.csv", b"text,n\nx,1\ny\n", r"a\.csv:3: 1 cells under 2 columns \(text, n\)"),
        ("a.csv", b'text\n"x\n', r"a\.csv:2: not CSV \(unexpected end of data\)"),
        ("a.csv", b"text\n\xff\n", r"a\.csv:\d: at or behind this line a byte is not UTF-8"),
        ("a.parquet", b"nothing", r"a\.parquet is not a parquet file"),
        ("a.xml", b"<x/>", r"a\.xml: its name must end in one of \.txt, \.jsonl"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(name, content, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        rows(path)


def test_one_text_of_a_whole_file_says_the_line_of_a_bad_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nab\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:3: byte 3 of the line"):
        rows(path, text_per="file")


def test_a_missing_or_unreadable_file_is_said(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: there is no such file"):
        rows(tmp_path / "gone.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt cannot be read: Is a directory"):
        rows(tmp_path / "folder.txt")
