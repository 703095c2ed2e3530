"""`manager` in this process, and a tiny model to fine-tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from manager.cli import main
from tests.support.finetuning import EXCHANGES, save_model, write_jsonl


@dataclass(frozen=True)
class Answer:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run `manager` here, where torch is loaded already."""

    def call_main(*words: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return Answer(int(left.value.code or 0), said.out, said.err)

    return call_main


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny", chat=True)


@pytest.fixture(scope="session")
def exchanges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)
