"""What `--adapter` can say: a name, a folder, or both."""

from __future__ import annotations

from pathlib import Path

import pytest

from manager.adapter_book import folder_of, name_for, spawned_adapters
from manager.spawn import SpawnConfig, words_of
from proto.adapter_name import is_adapter_name
from proto.errors import AdapterError


def test_a_name_without_a_folder_of_that_name_here_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of("medicine") is None
    (tmp_path / "medicine").mkdir()
    assert folder_of("medicine") == tmp_path / "medicine"


def test_what_looks_like_a_path_is_one_whether_or_not_it_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of("runs/medicine") == tmp_path / "runs" / "medicine"
    assert folder_of("./medicine") == tmp_path / "medicine"
    assert folder_of("mine=runs/medicine") == tmp_path / "runs" / "medicine"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/srv/medicine", "medicine"),
        ("/runs/2026-11-21 medicine/lora_adapters", "2026-11-21-medicine"),
        ("/srv/…", "adapter"),
        ("/", "adapter"),
        (f"/srv/{'long' * 30}", ("long" * 30)[:40]),
    ],
)
def test_a_folder_gives_its_adapter_a_name_like_its_own(folder, name, tmp_path):
    assert name_for(Path(folder)) == name
    assert is_adapter_name(name)


def test_two_folders_of_one_name_get_two_names(tmp_path):
    folders = [str(tmp_path / run / "adapter") for run in ("a", "b")]
    named = spawned_adapters([*folders, folders[0], f"mine={tmp_path}"])
    assert [folder for _, folder in named] == [*folders, str(tmp_path)]
    assert len({name for name, _ in named}) == 3
    assert named[2][0] == "mine"
    words = words_of(SpawnConfig(count=1, adapters=named), 0)
    assert f"mine={tmp_path}" in words and words.count("--adapter") == 3


def test_spawned_workers_cannot_know_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="--spawn starts workers that hold no adapter yet"):
        spawned_adapters(["medicine"])
