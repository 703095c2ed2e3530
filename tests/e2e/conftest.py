"""Real workers on loopback, shared by the tests that do them no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from manager.cli import main
from tests.support.chains import (
    Answer,
    TinyModel,
    Workers,
    save_tiny_with_tokenizer,
    sections_of,
    start_all,
)
from tests.support.serving import Server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model with a context of 4096 tokens."""
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def workers(tiny: TinyModel) -> Iterator[Workers]:
    """Two workers that hold the tiny model. Leave them as they are."""
    with ExitStack() as stack:
        yield start_all(stack, *sections_of(tiny.folder, 2, "--kv-memory", "64MB"))


@pytest.fixture(scope="session")
def server(workers: Workers) -> Iterator[Server]:
    """`manager serve` over the shared workers. Leave it as it is."""
    with Server("--workers", workers.option, "--max-concurrent", "256") as started:
        yield started


@pytest.fixture
def start() -> Iterator[Callable[..., Workers]]:
    """Start workers for one test, from their command lines."""
    with ExitStack() as stack:
        yield lambda *arguments: start_all(stack, *arguments)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run `manager` in this process, which has torch already: seconds less than a new one."""

    def call_main(*words: str, env: dict[str, str] | None = None) -> Answer:
        capsys.readouterr()  # what was said before is not its own
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as left:
                main(words)
        said = capsys.readouterr()
        return Answer(int(left.value.code or 0), said.out, said.err)

    return call_main
