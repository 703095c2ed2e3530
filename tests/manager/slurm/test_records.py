"""The file of records: what is written is there, whatever else goes wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import binary, text

from manager.slurm.records import JobRecord, Records
from proto.errors import JobError
from tests.support.processes import clean_environment
from tests.support.small_disk import why_no_small_disk, with_small_disk

# Adds records until it is told that it cannot: python -c ADD FILE FIRST COUNT
ADD = """
import sys
from pathlib import Path
from manager.slurm.records import JobRecord, Records
from proto.errors import JobError
records, first, count = Records(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
for number in range(first, first + count):
    try:
        records.add(
            JobRecord(
                job_id=str(number), cluster="lab", backend="pipeline", name="x" * 3000,
                submitted_at=0.0, folder="/", log="log", command=(),
            )
        )
    except JobError as exc:
        print(exc)
        break
print(*(it.job_id for it in records.all()))
print(records.path.read_bytes()[-1:])
"""


def job(job_id: str, **values: object) -> JobRecord:
    told = {
        "cluster": "lab",
        "backend": "pipeline",
        "name": "run",
        "submitted_at": 1.5,
        "folder": "/shared/run",
        "log": "slurm-%j.out",
        "command": ("manager", "submit"),
    }
    return JobRecord(job_id=job_id, **{**told, **values})  # type: ignore[arg-type]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "deep" / "jobs.jsonl")


def test_there_are_none_where_there_is_no_file(records):
    assert records.all() == ()
    assert records.find("1") is None
    assert not records.path.parent.exists()


def test_records_come_back_in_order_and_how_they_ended(records):
    first, second = job("1", name="odd | name\n\udce9 ü"), job("2")
    records.add(first)
    records.add(second)
    records.settle("1", "FAILED", 3, 99.5)
    one, two = records.all()
    assert (one.state, one.exit_code, one.ended_at) == ("FAILED", 3, 99.5)
    assert (one.name, one.command) == (first.name, first.command)
    assert two == second
    assert Records(records.path).find("1") == one


def test_what_is_nobody_elses_business_is_hidden(records):
    records.add(job("1"))
    assert stat.S_IMODE(records.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(records.path.parent.stat().st_mode) == 0o700


def test_numbers_are_those_of_one_cluster(records):
    records.add(job("7", cluster="lab"))
    records.add(job("7", cluster="elsewhere", name="other"))
    records.settle("7", "COMPLETED", 0, cluster="lab")
    assert [it.state for it in records.all("lab")] == ["COMPLETED"]
    assert [it.state for it in records.all("elsewhere")] == [None]
    found = records.find("7", "elsewhere")
    assert found is not None and found.name == "other"


def test_a_number_that_comes_again_is_a_new_job(records):
    records.add(job("7", name="old"))
    records.settle("7", "COMPLETED")
    records.add(job("7", name="new"))
    (record,) = records.all()
    assert (record.name, record.state) == ("new", None)


def test_the_latest_with_a_name_is_found(records):
    for number in ("1", "2", "3"):
        records.add(job(number, name="same" if number != "3" else "else"))
    found = records.find("same")
    assert found is not None and found.job_id == "2"


@given(rubbish=binary(max_size=40))
def test_a_line_that_was_cut_short_harms_no_other(tmp_path_factory, rubbish):
    records = Records(tmp_path_factory.mktemp("torn") / "jobs.jsonl")
    records.add(job("1"))
    with records.path.open("ab") as file:
        file.write(b'{"submitted": {"job_id": "2", "clu' + rubbish)
    assert [it.job_id for it in records.all()] == ["1"]
    records.add(job("3"))
    records.settle("1", "COMPLETED")
    assert [(it.job_id, it.state) for it in records.all()] == [("1", "COMPLETED"), ("3", None)]


@given(line=text(max_size=40))
def test_lines_of_another_kind_are_passed_over(tmp_path_factory, line):
    records = Records(tmp_path_factory.mktemp("odd") / "jobs.jsonl")
    records.add(job("1"))
    odd = [line, {"submitted": line}, {"submitted": {"job_id": line}}, {"ended": {"state": 5}}, 3]
    with records.path.open("a") as file:
        file.writelines(json.dumps(it) + "\n" for it in odd)
    assert [it.job_id for it in records.all()] == ["1"]


def test_a_field_of_a_later_version_is_passed_over(records):
    records.add(job("1"))
    said = json.loads(records.path.read_text())
    said["submitted"]["colour"] = "green"
    records.path.write_text(json.dumps(said) + "\n")
    assert records.find("1") == job("1")


def test_several_managers_write_at_the_same_time(records):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(records.path), str(first), "40"],
            stdout=subprocess.DEVNULL,
            env=clean_environment(),
        )
        for first in (100, 200, 300)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    numbers = {int(it.job_id) for it in records.all()}
    assert numbers == {first + it for first in (100, 200, 300) for it in range(40)}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"cannot write the record of .*: .*/file is not a folder; "):
        Records(tmp_path / "file" / "jobs.jsonl").add(job("1"))
    with pytest.raises(JobError, match=r"cannot read the records of jobs in .*: Is a directory"):
        Records(tmp_path).all()


def test_a_full_disk_is_one_sentence_and_what_was_written_stays(tmp_path):
    if reason := why_no_small_disk():
        pytest.skip(reason)
    command = [sys.executable, "-c", ADD, str(tmp_path / "jobs.jsonl"), "0", "100"]
    done = with_small_disk("64k", tmp_path, command, clean_environment())
    assert done.returncode == 0, done.stderr
    error, numbers, last_byte = done.stdout.splitlines()
    assert error.endswith(
        "jobs.jsonl: No space left on device; mend that, or set COMBOIO_JOBS_FILE to a file that "
        "can be written."
    )
    assert len(numbers.split()) > 5
    assert numbers.split() == [str(it) for it in range(len(numbers.split()))]
    assert last_byte == r"b'\n'"


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"COMBOIO_JOBS_FILE": "/x/jobs"}, "/x/jobs"),
        ({"XDG_STATE_HOME": "/state"}, "/state/comboio/jobs.jsonl"),
        ({"XDG_STATE_HOME": "relative"}, "~/.local/state/comboio/jobs.jsonl"),
        ({}, "~/.local/state/comboio/jobs.jsonl"),
    ],
)
def test_the_file_is_where_state_belongs(environ, path):
    assert Records.default(environ).path == Path(os.path.expanduser(path))
