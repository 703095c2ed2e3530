"""Workers on a tiny random model, shared between the tests that do them no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.models import save_tiny, tiny_model
from tests.support.processes import WorkerProcess
from tests.support.wire import Part


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 4 layers."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny("llama", folder)
    return folder


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    """The whole model, in this process, for what is expected."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def start(checkpoint: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers that end with the session; `start(0)` holds section 0 of 2."""
    with ExitStack() as stack:

        def start_worker(index: int, *args: str) -> WorkerProcess:
            return stack.enter_context(
                WorkerProcess(
                    "--model", str(checkpoint), "--sections", "2", "--index", str(index), *args
                )
            )

        yield start_worker


@pytest.fixture(scope="session")
def first(start: Callable[..., WorkerProcess]) -> WorkerProcess:
    """Holds layers 0 to 1."""
    return start(0, "--kv-memory", "1MiB")


@pytest.fixture(scope="session")
def last(start: Callable[..., WorkerProcess]) -> WorkerProcess:
    """Holds layers 2 to 3."""
    return start(1, "--kv-memory", "1MiB")


@pytest.fixture
def part(model: LlamaForCausalLM) -> Callable[..., Part]:
    """Make a run of a step out of token ids; the embedding is the manager's work."""

    def make(sequence: int, tokens: list[int], start: int = 0, **others: object) -> Part:
        with torch.inference_mode():
            hidden = model.get_input_embeddings()(torch.tensor(tokens))
        return Part(sequence=sequence, start=start, tokens=tokens, hidden=hidden, **others)

    return make
