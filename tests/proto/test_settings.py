"""Where settings may stand, which place wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from

from proto.errors import UsageError
from proto.settings import (
    Setting,
    SettingsFile,
    find_settings,
    parse_byte_size,
    read_settings_file,
    settings_file,
)

KNOWN = {"listen", "kv_memory", "threads"}


def find(toml: dict[str, object], environ: dict[str, str] | None = None) -> dict[str, Setting]:
    file = SettingsFile(Path("comboio.toml"), {"worker": toml})
    return find_settings("worker", KNOWN, file=file, environ=environ or {})


def test_the_environment_wins_over_the_file_and_each_says_where_it_stands() -> None:
    found = find({"listen": "a", "kv-memory": 5}, {"COMBOIO_LISTEN": "b", "COMBOIO_THREADS": ""})
    assert found == {
        "listen": Setting("b", "COMBOIO_LISTEN"),
        "kv_memory": Setting(5, "kv-memory in [worker] of comboio.toml"),
    }


def test_only_the_tables_own_keys_are_looked_at() -> None:
    file = SettingsFile(Path("comboio.toml"), {"manager": {"whatever": 1}})
    assert find_settings("worker", KNOWN, file=file, environ={"COMBOIO_OTHER": "1"}) == {}


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ({"thread": 1}, "unknown key 'thread' in [worker] of comboio.toml: did you mean 'threads'"),
        ({"zzz": 1}, "known are kv_memory, listen, threads."),
        ({"kv-memory": 1, "kv_memory": 1}, "sets 'kv_memory' twice"),
        ({"listen": {"host": "a"}}, "listen in [worker] of comboio.toml is a table"),
    ],
)
def test_a_bad_key_is_an_error_that_names_it(toml: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        find(toml)
    assert words in str(refused.value)


def test_the_file_lies_here_or_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings_file({}) is None
    assert read_settings_file(settings_file({})).tables == {}
    Path("comboio.toml").write_text('[worker]\nlisten = "a"\n')
    assert settings_file({}) == Path("comboio.toml")
    assert read_settings_file(settings_file({})).tables == {"worker": {"listen": "a"}}
    other = tmp_path / "other.toml"
    with pytest.raises(UsageError, match=r"COMBOIO_CONFIG names .*other.toml.*no such file"):
        settings_file({"COMBOIO_CONFIG": str(other)})
    other.write_text("[manager]\n")
    assert settings_file({"COMBOIO_CONFIG": str(other)}) == other
    assert settings_file({"COMBOIO_CONFIG": "/dev/null"}) is None  # and none from here either


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[worker", "is not valid TOML"),
        (b"\xff", "is not valid TOML"),
        (b"listen = 1", "says 'listen' at its top: keys belong under [worker] or [manager]"),
        (b"[worke]", "says 'worke' at its top"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "comboio.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refused:
        read_settings_file(path)
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_settings_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1048576", 2**20), ("512MB", 512 * 10**6), ("1.5GiB", 3 * 2**29), (" 64 k", 64000)],
)
def test_a_size_is_read_as_people_write_it(text: str, num_bytes: int) -> None:
    assert parse_byte_size(text) == num_bytes


@given(number=integers(0, 10**6), unit=sampled_from("kKmMgGtT"), binary=sampled_from(["", "i"]))
def test_a_unit_is_a_power_of_its_base(number: int, unit: str, binary: str) -> None:
    power = "kmgt".index(unit.lower()) + 1
    expected = number * (1024 if binary else 1000) ** power
    assert parse_byte_size(f"{number}{unit}{binary}B") == expected


@pytest.mark.parametrize("text", ["", "MB", "-1", "5q", "1,5GB", "1iB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_byte_size(text)
