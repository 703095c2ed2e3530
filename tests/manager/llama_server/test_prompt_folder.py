"""A folder of prompts, and the files that answers go to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from manager.llama_server.prompt_folder import read_prompt_folder
from manager.llama_server.result_file import check_result_file, write_result
from proto.errors import UsageError


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_prompt_folder(folder)
    return str(caught.value)


def test_both_spellings_are_read_and_the_last_line_break_is_not_part_of_the_prompt(tmp_path):
    (tmp_path / "user_prompt").write_text("two\nlines\n\n")
    assert read_prompt_folder(tmp_path) == ({"role": "user", "content": "two\nlines\n"},)
    (tmp_path / "system_prompt.txt").write_bytes("\ufeffolá\r\n".encode())
    assert read_prompt_folder(tmp_path)[0] == {"role": "system", "content": "olá"}


def test_what_is_missing_twice_empty_or_not_text_is_told(tmp_path):
    assert "does not exist" in refused(tmp_path / "no")
    assert "has neither user_prompt nor user_prompt.txt" in refused(tmp_path)
    user = tmp_path / "user_prompt.txt"
    user.write_text(" \n")
    assert f"{user} is empty" in refused(tmp_path)
    user.write_bytes(b"ol\xe1")
    assert f"{user} is not UTF-8 (byte 2)" in refused(tmp_path)
    (tmp_path / "user_prompt").write_text("hi")
    assert "has both user_prompt and user_prompt.txt" in refused(tmp_path)
    assert "is a file, not a folder" in refused(user)


def test_an_answer_is_written_whole_with_its_timings_beside_it(tmp_path):
    path = tmp_path / "answer.md"
    write_result(path, "olá", {"load_s": 1.5})
    assert path.read_text() == "olá\n"
    assert json.loads((tmp_path / "answer.md.timings.json").read_text()) == {"load_s": 1.5}
    path.chmod(0o640)
    write_result(path, "new\n", {})
    assert path.read_text() == "new\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["answer.md", "answer.md.timings.json"]


def test_a_pipe_gets_the_text_and_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_result_file("result_file", pipe)
        write_result(pipe, "text", {"load_s": 1.5})
        assert os.read(reader, 100) == b"text\n"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_place_that_cannot_be_written_is_told_before(tmp_path):
    with pytest.raises(UsageError, match=r"result_file .* is a folder: name a file"):
        check_result_file("result_file", tmp_path)
    with pytest.raises(UsageError, match=r"there is no folder .*/no, make it first"):
        check_result_file("result_file", tmp_path / "no/a.txt")
