"""A batch whose server was lost begins again, and its results go on where they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manager.generation import GREEDY
from manager.prompts import Row, read_prompts
from manager.results import Results, open_results

MADE_BY = {"model": "tiny"}


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\n")
    return read_prompts(path, GREEDY)


def add(results: Results, row: Row) -> None:
    results.add(row, {"index": row.index, "id": row.id, "text": row.prompt, "error": None})


async def run_twice(path: Path | None, rows: list[Row]) -> None:
    with open_results(path, rows, overwrite=False) as results:
        results.begin(MADE_BY)
        add(results, rows[0])
        add(results, rows[2])
        await results.pause()
        results.begin(MADE_BY)
        assert results.done == {0, 2}
        add(results, rows[1])
        await results.finish()
        assert results.num_failed == 0


async def test_in_a_file(rows, tmp_path):
    path = tmp_path / "out.jsonl"
    await run_twice(path, rows)
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


async def test_on_stdout(rows, capfd):
    await run_twice(None, rows)
    written = capfd.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in written] == ["a", "b", "c"]
