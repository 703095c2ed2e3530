"""A run's folder: what is written appears whole, and nobody else's files are touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.jobs.folders import sweep, write_file, write_folder
from engine.jobs.run_folder import open_run_folder
from engine.jobs.settings import OutputSettings
from proto.errors import Error, UsageError
from tests.support.processes import ROOT, clean_environment


def names(folder):
    return sorted(it.name for it in folder.iterdir())


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "result"
    write_folder(target, lambda it: (it / "old").write_text("1") and None)
    write_folder(target, lambda it: (it / "new").write_text("2") and None)
    assert names(tmp_path) == ["result"] and names(target) == ["new"]


def test_a_folder_that_could_not_be_written_leaves_the_old_one(tmp_path):
    target = tmp_path / "result"
    write_folder(target, lambda it: (it / "old").write_text("1") and None)

    def fail(partial):
        (partial / "new").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(Error, match=r"result cannot be written, the disk is full \(.* GB free\)"):
        write_folder(target, fail)
    assert names(tmp_path) == ["result"] and names(target) == ["old"]


def test_a_file_is_replaced_whole(tmp_path):
    write_file(tmp_path / "a", "one")
    write_file(tmp_path / "a", b"two")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "two"
    with pytest.raises(Error, match="cannot be written: Not a directory"):
        write_file(tmp_path / "a" / "b", "x")


def test_what_a_killed_run_left_is_cleared_up(tmp_path):
    (tmp_path / ".partial-result").mkdir()
    (tmp_path / ".partial-run.json").write_text("{")
    (tmp_path / ".replaced-kept").mkdir()  # killed between the two renames
    (tmp_path / ".replaced-result").mkdir()
    (tmp_path / "result").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["kept", "result"]


def opened(path, **settings):
    with open_run_folder(OutputSettings(save_dir=str(path), **settings)) as folder:
        return folder


def test_a_folder_with_something_in_it_is_refused_unless_told(tmp_path):
    folder = opened(tmp_path / "deep" / "run")
    folder.write({"state": "running"})
    (folder.path / "checkpoints").mkdir()
    (folder.path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match=r"run is not empty: pass --resume .* --overwrite"):
        opened(folder.path)
    assert opened(folder.path, resume=True).read() == {"state": "running"}
    assert opened(folder.path, overwrite=True).read() is None
    assert names(folder.path) == [".lock", "mine.txt"]


def test_resuming_or_overwriting_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"--resume: .* holds no run"):
        opened(tmp_path, resume=True)
    with pytest.raises(UsageError, match=r"--overwrite removes an earlier run, .* 'thesis\.tex'"):
        opened(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match=r"thesis\.tex is a file: name a folder"):
        opened(tmp_path / "thesis.tex")
    assert names(tmp_path) == ["thesis.tex"]


def test_resuming_what_is_not_there_yet_begins(tmp_path):
    assert opened(tmp_path / "run", resume=True).read() is None


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    script = (
        "import sys\n"
        "from engine.jobs.run_folder import open_run_folder\n"
        "from engine.jobs.settings import OutputSettings\n"
        "with open_run_folder(OutputSettings(save_dir=sys.argv[1])):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=clean_environment(),
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match="another run writes there now"):
            opened(tmp_path)
    finally:
        holder.communicate("", timeout=20)
    opened(tmp_path)  # a lock ends with its process


def test_a_damaged_run_file_is_said(tmp_path):
    folder = opened(tmp_path)
    Path(folder.run_file).write_text("{")
    with pytest.raises(UsageError, match=r"run\.json cannot be read .* --overwrite to begin anew"):
        folder.read()
