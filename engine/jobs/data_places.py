"""Find out what a `--train-path` means: a file, a folder of files, or a data set of the hub.

Gives sources, each of them a stream of rows with one set of columns. A folder or a data set may
hold splits, told by their files' names (`train-00000-of-00004.parquet`, `validation.jsonl`); test
splits are never read. Hub names work offline from what lies in the caches of `huggingface_hub`
and `datasets`. Knows no shape and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from engine.jobs.data_files import READERS, read_rows
from engine.jobs.rows import DataError, Place, Row

# The sets that the cluster guides train on, by the names that the guides give them.
NAMED_SETS: Final = {
    "hpc-instruct": "hpcgroup/hpc-instruct",
    "evol-instruct": "nickrosh/Evol-Instruct-Code-80k-v1",
    "magicoder": "ise-uiuc/Magicoder-OSS-Instruct-75K",
}

_SPLITS: Final = {
    "train": re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)"),
    "validation": re.compile(r"(^|[^a-z])(val|valid|validation|dev|eval)([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])test(ing)?([^a-z]|$)"),
}


class Source(Protocol):
    """One stream of rows."""

    @property
    def name(self) -> str:
        """For sentences."""
        ...

    def rows(self, text_per: str) -> Iterator[tuple[Place, Row]]:
        """All rows, in order."""
        ...


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of rows."""

    path: Path

    @property
    def name(self) -> str:
        """For sentences."""
        return str(self.path)

    def rows(self, text_per: str) -> Iterator[tuple[Place, Row]]:
        """See `read_rows`."""
        return read_rows(self.path, text_per=text_per)


@dataclass(frozen=True, slots=True)
class TableSource:
    """A split of a set that the `datasets` library holds."""

    name: str
    table: Any  # datasets.Dataset

    def rows(self, text_per: str) -> Iterator[tuple[Place, Row]]:
        """Every row of the table."""
        for number, row in enumerate(self.table, start=1):
            yield Place(self.name, number, "row"), row


@dataclass(frozen=True, slots=True)
class Found:
    """What a name stands for. Without validation rows of its own, the second is empty."""

    train: list[Source] = field(default_factory=list)
    validation: list[Source] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # test splits


def find_data(name: str, *, option: str) -> Found:
    """The sources behind a path or a hub name.

    Args:
        option: what the name was given to, for sentences.
    Raises:
        DataError: there is nothing there, or nothing that can be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{option} {name}: the file's name must end in one of {', '.join(READERS)}."
            )
        return Found([FileSource(path)])
    if path.is_dir():
        return _find_in_folder(path, option)
    hub_name = NAMED_SETS.get(name.lower(), name)
    if path.suffix.lower() in READERS or hub_name.startswith((".", "/", "~")):
        raise DataError(f"{option} {name}: there is no such file or folder.")
    return _find_on_hub(hub_name, option)


def _find_in_folder(folder: Path, option: str) -> Found:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_by_datasets(folder, option)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.name not in _NOT_DATA
    )
    if not files:
        raise DataError(
            f"{option} {folder}: the folder holds no file that ends in one of {', '.join(READERS)}."
        )
    by_split: dict[str | None, list[Path]] = {}
    for path in files:
        by_split.setdefault(split_of(path.relative_to(folder)), []).append(path)
    if "train" not in by_split:
        return Found([FileSource(path) for path in files])
    ignored = [str(it) for split in ("test", None) for it in by_split.get(split, [])]
    return Found(
        [FileSource(path) for path in by_split["train"]],
        [FileSource(path) for path in by_split.get("validation", [])],
        ignored,
    )


# What lies beside data without being data.
_NOT_DATA: Final = {"dataset_info.json", "dataset_infos.json", "requirements.txt", "LICENSE.txt"}


def split_of(path: Path) -> str | None:
    """Which split a file's name speaks of; None if of none. Its own name counts before folders'."""
    for part in reversed(path.with_suffix("").parts):
        for split, pattern in _SPLITS.items():
            if pattern.search(part.lower()):
                return split
    return None


def _saved_by_datasets(folder: Path, option: str) -> Found:
    datasets = _import_datasets(f"{option} {folder} was saved by the datasets library")
    try:
        return _tables(str(folder), datasets.load_from_disk(str(folder)))
    except Exception as exc:  # arrow's errors, and whatever a damaged folder brings up
        raise DataError(f"{option} {folder} cannot be read ({_first_line(exc)}).") from exc


def _find_on_hub(name: str, option: str) -> Found:
    """`org/set`, or `org/set:configuration`."""
    repo, _, config = name.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise DataError(
            f"{option} {name}: there is no such file or folder, and it is no hub name like org/set "
            f"(known by a short name: {', '.join(NAMED_SETS)})."
        )
    reasons = []
    for find in (_through_datasets, _through_hub_cache):
        try:
            return find(repo, config, option)
        except _NotFound as exc:
            reasons.append(str(exc))
    from huggingface_hub.constants import HF_HUB_OFFLINE

    where = "in the caches (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else "on the hub"
    raise DataError(
        f"{option} {name}: no such file or folder here, and no such data set was found {where}: "
        f"{'; '.join(dict.fromkeys(reasons))}."
    )


class _NotFound(Exception):
    """Not there, by this way of looking."""


def _through_datasets(repo: str, config: str, option: str) -> Found:
    datasets = _import_datasets(f"{option} {repo} is a data set of the hub")
    try:
        loaded = datasets.load_dataset(repo, config or None)
    except Exception as exc:  # its own errors, the hub's, the network's, a builder's
        raise _NotFound(_first_line(exc)) from exc
    return _tables(repo, loaded)


def _tables(name: str, loaded: Any) -> Found:
    if not isinstance(loaded, dict):  # a single split
        return Found([TableSource(name, loaded)])
    if "train" not in loaded:
        return Found([TableSource(f"{name} ({split})", it) for split, it in loaded.items()])
    validation = [key for key in loaded if key != "train" and split_of(Path(key)) == "validation"]
    ignored = [f"{name} ({key})" for key in loaded if key not in ("train", *validation)]
    return Found(
        [TableSource(f"{name} (train)", loaded["train"])],
        [TableSource(f"{name} ({key})", loaded[key]) for key in validation],
        ignored,
    )


def _through_hub_cache(repo: str, config: str, option: str) -> Found:
    """Data files as they lie in a set's repository; `hf download --repo-type dataset` puts them."""
    from huggingface_hub import snapshot_download

    patterns = [f"{config}/*" if config else "*"]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=patterns))
    except Exception as exc:  # offline, unknown, gated: the hub's own errors and the network's
        raise _NotFound(_first_line(exc)) from exc
    return _find_in_folder(folder / config if config else folder, option)


def _import_datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as exc:
        raise DataError(
            f"{why}, and the datasets library is not installed: pip install 'comboio[finetune]'."
        ) from exc
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(exc).__name__
