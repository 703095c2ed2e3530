"""`manager report`: a table and pictures of metrics files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manager.cli import main

RUN: dict[str, Any] = {
    "model": "demo",
    "batch_size": 16,
    "wall_s": 4.0,
    "completed": 32,
    "failed": 0,
    "prompt_tokens": 1200,
    "completion_tokens": 2048,
    "tokens_per_s": 512.04,
    "prompt_tokens_per_s": 300.0,
    "total_tokens_per_s": 812.0,
    "latency_s": {"p50": 1.5, "p95": 2.25, "mean": 1.6, "max": 3.0},
    "ttft_s": {"p50": 0.125, "p95": None, "mean": None, "max": None},
    "workers": [{"layers": "0:5", "busy_share": 0.71, "peak_rss_bytes": 400_000_000}],
}


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["report", *words])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_runs_stand_beside_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rate in (("two|boards", 512.04), ("four", 900.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**RUN, "tokens_per_s": rate}))
    paths = [str(tmp_path / f"{name}.json") for name in ("two|boards", "four")]
    code, out, _ = call(capsys, *paths)
    rows = {
        cells[0].strip(): [it.strip() for it in cells[1:]]
        for cells in (line.strip("| ").replace("\\|", "/").split("|") for line in out.splitlines())
    }
    assert code == 0 and rows["two/boards"] == ["four"]  # the first cell of the head is empty
    assert rows["generated tokens/s"] == ["512.0", "900.0"]
    assert rows["generated tokens"] == ["2 048", "2 048"]
    assert rows["first token p95, s"] == ["–", "–"] and rows["between tokens p50, s"] == ["–", "–"]
    assert rows["workers busy"] == ["71 %", "71 %"]
    assert rows["workers' memory"] == ["400.0 MB", "400.0 MB"]


def test_pictures_and_a_page_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**RUN, "tokens_per_s": None, "workers": []}))
    code, out, err = call(capsys, str(path), "-o", str(tmp_path / "out"))
    assert (code, out) == (0, "") and "3 pictures" in err
    page = (tmp_path / "out" / "report.md").read_text()
    for name in ("throughput.png", "times.png", "workers.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), ("{", "is no JSON"), ("[]", "is no metrics file")],
)
def test_what_is_no_metrics_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    code, _, err = call(capsys, str(path))
    assert code == 2 and words in err and err.count("\n") == 1
