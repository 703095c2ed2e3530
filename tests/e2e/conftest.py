"""Real workers on loopback, shared by the tests that do them no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.chains import (
    TinyModel,
    Workers,
    save_tiny_with_tokenizer,
    sections_of,
    start_all,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model with a context of 4096 tokens."""
    return save_tiny_with_tokenizer(tmp_path_factory.mktemp("tiny"), max_position_embeddings=4096)


@pytest.fixture(scope="session")
def workers(tiny: TinyModel) -> Iterator[Workers]:
    """Two workers that hold the tiny model. Leave them as they are."""
    with ExitStack() as stack:
        yield start_all(stack, *sections_of(tiny.folder, 2, "--kv-memory", "64MB"))


@pytest.fixture
def start() -> Iterator[Callable[..., Workers]]:
    """Start workers for one test, from their command lines."""
    with ExitStack() as stack:
        yield lambda *arguments: start_all(stack, *arguments)
