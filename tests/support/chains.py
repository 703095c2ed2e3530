"""Chains of real workers over a tiny random model, and the `manager` command to run on them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.support.models import save_tiny
from tests.support.processes import ROOT, Answer, WorkerProcess, clean_environment
from tests.support.tokenizers import save_tokenizer

VOCAB = 300


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint with a tokenizer, and the same model whole, in this process."""

    folder: Path
    model: Any
    tokenizer: Any

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What transformers itself generates."""
        import torch

        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
        return [int(token) for token in out[0][len(prompt) :]]


@dataclass(frozen=True)
class Workers:
    """A running chain."""

    processes: list[WorkerProcess]

    @cached_property
    def addresses(self) -> list[str]:
        return [process.address for process in self.processes]

    @property
    def option(self) -> str:
        """The value of --workers."""
        return ",".join(self.addresses)


def save_tiny_with_tokenizer(
    folder: Path, kind: str = "llama", *, chat: bool = True, **overrides: Any
) -> TinyModel:
    """A model of 4 layers in float32 with a tokenizer, which has a chat template if `chat`."""
    model = save_tiny(kind, folder, **{"vocab_size": VOCAB, **overrides})
    return TinyModel(folder, model, save_tokenizer(folder, VOCAB, chat=chat))


def start_all(stack: ExitStack, *arguments: tuple[str, ...]) -> Workers:
    """Start workers at the same time; they end with the stack."""
    processes = [stack.enter_context(WorkerProcess(*words, wait=False)) for words in arguments]
    for process in processes:
        process.wait_until_ready()
    return Workers(processes)


def sections_of(folder: Path, count: int, *more: str) -> list[tuple[str, ...]]:
    """Command lines for all sections of a model."""
    return [
        ("--model", str(folder), "--sections", str(count), "--index", str(index), *more)
        for index in range(count)
    ]


def manager(
    *words: str, stdin: str | bytes | None = None, env: dict[str, str] | None = None
) -> Answer:
    """Run the command to its end, in a process of its own."""
    if isinstance(stdin, bytes):
        stdin = stdin.decode("utf-8", "surrogateescape")
    done = subprocess.run(
        [sys.executable, "-m", "manager", *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=120,
        cwd=ROOT / "tests",
        env=clean_environment(env),
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def start_manager(*words: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start the command and leave it running."""
    return subprocess.Popen(
        [sys.executable, "-m", "manager", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT / "tests",
        env=clean_environment(env),
    )
