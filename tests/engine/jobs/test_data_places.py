"""What `--train-path` may name: files, folders with splits, hub names from the caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.jobs.data_places import find_data, split_of
from engine.jobs.rows import DataError


def find(name):
    return find_data(str(name), option="--train-path")


def names(sources):
    return [Path(source.name).name for source in sources]


def make(folder, *files):
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n')
    return folder


def test_a_folder_without_splits_is_all_its_files_in_order(tmp_path):
    make(tmp_path, "b.jsonl", "a.txt", "deep/c.json", ".hidden/d.txt", "README.md", "f.py")
    found = find(tmp_path)
    assert names(found.train) == ["a.txt", "b.jsonl", "c.json"]
    assert found.validation == []


def test_a_folder_with_splits_keeps_them_apart_and_never_reads_the_test(tmp_path):
    make(
        tmp_path, "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
        "data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "extra.jsonl",
    )  # fmt: skip
    found = find(tmp_path)
    assert names(found.train) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names(found.validation) == ["validation-00000-of-00001.jsonl"]
    assert sorted(map(Path, found.ignored)) == [
        tmp_path / "data/test-00000-of-00001.jsonl", tmp_path / "extra.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train.txt", "train"),
        ("my_training.jsonl", "train"),
        ("val.jsonl", "validation"),
        ("dev/a.jsonl", "validation"),
        ("train/test_set.csv", "test"),
        ("constraint.txt", None),
        ("trainer.txt", None),
        ("latest.json", None),
        ("values.json", None),
    ],
)
def test_a_split_is_told_by_whole_words(path, split):
    assert split_of(Path(path)) == split


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gone.jsonl", "there is no such file or folder"),
        ("/gone", "there is no such file or folder"),
        ("gone", "no hub name like org/set .*hpc-instruct, evol-instruct, magicoder"),
    ],
)
def test_a_name_that_is_nowhere_is_refused(name, sentence):
    with pytest.raises(DataError, match=f"--train-path {name}: .*{sentence}"):
        find(name)


def test_an_empty_folder_and_a_file_of_another_kind_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"the folder holds no file that ends in one of \.txt"):
        find(tmp_path)
    make(tmp_path, "a.docx")
    with pytest.raises(DataError, match=r"the file's name must end in one of \.txt"):
        find(tmp_path / "a.docx")


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of the hub and of the datasets library."""
    import datasets
    import huggingface_hub

    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return hub


def test_a_hub_name_is_found_offline_in_the_hub_cache(caches, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = caches / "datasets--hpcgroup--hpc-instruct"
    make(repo / "snapshots" / commit, "data/train.jsonl", "data/test.jsonl")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name in ("hpcgroup/hpc-instruct", "hpc-instruct"):
        assert names(find(name).train) == ["train.jsonl"]


def test_a_hub_name_is_found_offline_in_the_cache_of_the_datasets_library(caches, tmp_path):
    import datasets

    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    builder = datasets.load_dataset_builder(
        "json", data_files={"train": str(path)}, cache_dir=str(tmp_path / "elsewhere")
    )
    kept = tmp_path / "datasets" / "some___set" / "default" / "0.0.0" / "0123456789abcdef"
    builder.download_and_prepare(str(kept))
    (kept / "json-train.arrow").rename(kept / "set-train.arrow")
    (source,) = find("some/set").train
    assert [row for _, row in source.rows("line")] == [{"text": "x"}, {"text": "y"}]


def test_a_set_that_the_datasets_library_saved_is_read(caches, tmp_path):
    import datasets

    kept = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    kept.save_to_disk(str(tmp_path / "one"), num_proc=None)
    (source,) = find(tmp_path / "one").train
    assert [row for _, row in source.rows("line")] == [{"text": "x"}, {"text": "y"}]
    both = datasets.DatasetDict({"train": kept, "validation": kept, "test": kept})
    both.save_to_disk(str(tmp_path / "all"))
    found = find(tmp_path / "all")
    assert (len(found.train), len(found.validation), len(found.ignored)) == (1, 1, 1)


def test_a_hub_name_that_is_in_no_cache_says_so(caches):
    with pytest.raises(
        DataError,
        match=r"--train-path some/set: .*was found in the caches \(HF_HUB_OFFLINE is set\)",
    ):
        find("some/set")
