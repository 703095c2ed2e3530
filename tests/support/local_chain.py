"""Run the stages of one checkpoint in this process, fed as the scheduler feeds workers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.attention import StageRun
from engine.entry import Entry, load_entry
from engine.stage import Stage
from engine.stage_loading import load_stage
from tests.support.tokenizers import save_tokenizer

WHOLE = 1 << 20  # a chunk that no prompt exceeds


@dataclass(slots=True)
class Prompted:
    """One prompt with what was generated for it."""

    tokens: list[int]
    prompt_tokens: int
    wanted: int  # tokens, prompt included
    blocks: list[int]
    rope_length: int
    computed: int = 0

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.wanted


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous stretch of one sequence inside a step."""

    tokens: list[int]
    start: int
    rope_length: int
    blocks: list[int]


class Chain:
    """An entry and stages that together hold every layer once."""

    def __init__(self, entry: Entry, stages: Sequence[Stage], num_blocks: int = 160) -> None:
        self.entry, self.stages, self.num_blocks = entry, list(stages), num_blocks
        self.caches = [stage.new_cache(num_blocks) for stage in stages]
        self.block_tokens = stages[0].block_tokens

    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """One micro-batch through all stages: the logits (tokens, vocab_size) of each piece."""
        token_ids = torch.tensor([token for piece in pieces for token in piece.tokens])
        positions = [at for it in pieces for at in range(it.start, it.start + len(it.tokens))]
        runs = [
            StageRun(
                start=piece.start,
                num_tokens=len(piece.tokens),
                rope_length=piece.rope_length,
                blocks=torch.tensor(piece.blocks),
            )
            for piece in pieces
        ]
        hidden = self.entry.embed(token_ids, positions)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden = stage.forward(token_ids, hidden, runs, cache)
        logits = self.stages[-1].logits(hidden)
        return list(logits.split([len(piece.tokens) for piece in pieces]))

    def prefill(
        self, tokens: Sequence[int], *, chunk_tokens: int = WHOLE, blocks: list[int] | None = None
    ) -> Tensor:
        """Logits (tokens, vocab_size) of one prompt, fed in chunks."""
        blocks = blocks if blocks is not None else self.scattered(1, len(tokens))[0]
        parts = [
            self.step([Piece(list(tokens[at : at + chunk_tokens]), at, len(tokens), blocks)])[0]
            for at in range(0, len(tokens), chunk_tokens)
        ]
        return torch.cat(parts)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, chunk_tokens: int = WHOLE
    ) -> list[list[int]]:
        """Greedy continuations, all sequences in one batch that joins chunks and decode tokens."""
        longest = max(map(len, prompts)) + max_new_tokens
        tables = self.scattered(len(prompts), longest)
        sequences = [
            Prompted(list(it), len(it), len(it) + max_new_tokens, table, len(it))
            for it, table in zip(prompts, tables, strict=True)
        ]
        while running := [it for it in sequences if not it.is_done]:
            pieces = [self._next_piece(it, chunk_tokens) for it in running]
            for it, piece, logits in zip(running, pieces, self.step(pieces), strict=True):
                it.computed += len(piece.tokens)
                if it.computed == len(it.tokens):
                    it.tokens.append(int(logits[-1].argmax()))
        return [it.tokens[it.prompt_tokens :] for it in sequences]

    def scattered(self, num_sequences: int, num_tokens: int) -> list[list[int]]:
        """Block tables without order, none used twice, over blocks that earlier calls filled."""
        ids = list(range(self.num_blocks))
        random.Random(0).shuffle(ids)
        each = -(-num_tokens // self.block_tokens)
        assert each * num_sequences <= self.num_blocks
        return [ids[each * at : each * (at + 1)] for at in range(num_sequences)]

    def _next_piece(self, it: Prompted, chunk_tokens: int) -> Piece:
        switch = self.entry.rope_switch
        if switch is not None and it.rope_length <= switch < len(it.tokens):
            # LongRoPE's other factors change every key: computed anew, as the scheduler does.
            it.rope_length, it.computed = len(it.tokens), 0
        tokens = it.tokens[it.computed : it.computed + chunk_tokens]
        return Piece(tokens, it.computed, it.rope_length, it.blocks)


def open_entry(folder: Path, dtype: str = "float32") -> Entry:
    """The entry of a tiny checkpoint, which gets a tokenizer where it has none."""
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(folder, 300)
    return load_entry(str(folder), dtype=dtype)


def split(folder: Path, num_sections: int, dtype: str = "float32") -> Chain:
    """A chain of so many balanced sections, each planned and loaded as a worker does it."""
    stages = [
        load_stage(str(folder), sections=num_sections, index=index, dtype=dtype, device="cpu")
        for index in range(num_sections)
    ]
    return Chain(open_entry(folder, dtype), stages)


def cut(folder: Path, layers: Iterable[tuple[int, int]], dtype: str = "float32") -> Chain:
    """A chain of the sections named."""
    stages = [load_stage(str(folder), layers=it, dtype=dtype, device="cpu") for it in layers]
    return Chain(open_entry(folder, dtype), stages)
