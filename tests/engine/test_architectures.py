"""Whatever the architecture and however it is cut: transformers' own tokens and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_chain import Chain, Piece, cut, split
from tests.support.models import KINDS, OTHERS, PROMISED, VOCAB, save_tiny

LENGTHS = (1, 7, 64, 200)
NEW_TOKENS = 14
TOLERANCE = 1e-4
LONGROPE = [kind for kind in KINDS if "longrope" in kind]


@dataclass(frozen=True)
class Truth:
    """A tiny checkpoint, and what transformers makes of some prompts."""

    kind: str
    folder: Path
    model: Any

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def logits(self, prompt: list[int]) -> Tensor:
        """(tokens, vocab_size) of the whole model in one pass."""
        with torch.no_grad():
            self._forget()
            logits: Tensor = self.model(torch.tensor([prompt]), use_cache=False).logits[0]
        return logits

    def tokens(self, prompt: list[int], max_new_tokens: int = NEW_TOKENS) -> list[int]:
        """What `generate` writes behind the prompt."""
        self._forget()
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )
        written: list[int] = out[0, len(prompt) :].tolist()
        return written

    def _forget(self) -> None:
        """Dynamic NTK tables of the library stay as the longest call so far left them."""
        self.model(torch.tensor([[0]]), use_cache=False)


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    prompt: list[int] = torch.randint(VOCAB, (length,), generator=generator).tolist()
    return prompt


PROMPTS = [prompt_of(length) for length in LENGTHS]


@pytest.fixture(scope="module")
def make_truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Truth]:
    def make(kind: str) -> Truth:
        folder = tmp_path_factory.mktemp(kind)
        return Truth(kind, folder, save_tiny(kind, folder))

    return make


@pytest.fixture(scope="module", params=KINDS)
def truth(request: pytest.FixtureRequest, make_truth: Callable[[str], Truth]) -> Truth:
    """One checkpoint a kind, for all tests of it."""
    return make_truth(request.param)


@pytest.fixture(scope="module")
def tokens(truth: Truth) -> list[list[int]]:
    """What `generate` writes behind each of PROMPTS."""
    return [truth.tokens(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def logits(truth: Truth) -> list[Tensor]:
    """The whole model's logits for each of PROMPTS."""
    return [truth.logits(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["1 section", "2 sections", "3 sections", "each layer"])
def chain(request: pytest.FixtureRequest, truth: Truth) -> Iterator[Chain]:
    if request.param == "each layer":
        yield cut(truth.folder, [(layer, layer + 1) for layer in range(truth.num_layers)])
    else:
        yield split(truth.folder, int(request.param.split()[0]))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference; NaN stays NaN, and fails every comparison."""
    return float((ours - theirs).abs().max())


def test_greedy_tokens_are_those_of_generate(
    truth: Truth, chain: Chain, tokens: list[list[int]]
) -> None:
    """All prompts share their steps: chunks of one beside the decode tokens of another."""
    assert chain.generate(PROMPTS, NEW_TOKENS, chunk_tokens=48) == tokens


def test_logits_are_the_whole_models(
    truth: Truth,
    chain: Chain,
    logits: list[Tensor],
) -> None:
    """Fed whole and in chunks that no block or window divides, into scattered blocks."""
    worst = 0.0
    for prompt, theirs in zip(PROMPTS, logits, strict=True):
        for chunk_tokens in (len(prompt), 29):
            worst = max(worst, error(chain.prefill(prompt, chunk_tokens=chunk_tokens), theirs))
    print(f"{truth.kind}: max logits error {worst:.1e}")  # pytest -rP shows it
    assert worst < TOLERANCE


def test_the_checkpoint_shows_mistakes(truth: Truth, logits: list[Tensor]) -> None:
    """Every layer and every earlier token matters by far more than the tolerance."""
    theirs = logits[-1]
    assert float(theirs.std()) > 0.5
    changed = [(PROMPTS[-1][0] + 1) % VOCAB, *PROMPTS[-1][1:]]
    assert error(truth.logits(changed)[1:8], theirs[1:8]) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_logits_do_not_depend_on_who_shares_the_step(
    kind: str, make_truth: Callable[[str], Truth]
) -> None:
    chain = split(make_truth(kind).folder, 2)
    tables = chain.scattered(len(PROMPTS), max(LENGTHS))
    alone = [
        chain.prefill(prompt, blocks=table) for prompt, table in zip(PROMPTS, tables, strict=True)
    ]
    pieces = [
        Piece(prompt, 0, len(prompt), table) for prompt, table in zip(PROMPTS, tables, strict=True)
    ]
    for ours, theirs in zip(chain.step(pieces), alone, strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_blocks_in_a_row_and_scattered_ones_give_the_same(
    kind: str, make_truth: Callable[[str], Truth]
) -> None:
    chain = split(make_truth(kind).folder, 2)
    prompt = PROMPTS[-1]
    in_a_row = chain.prefill(prompt, chunk_tokens=33, blocks=list(range(20, 33)))
    backwards = chain.prefill(prompt, chunk_tokens=33, blocks=list(range(90, 77, -1)))
    assert error(in_a_row, backwards) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neox"])
def test_prompts_with_equal_beginnings_may_share_blocks(
    kind: str, make_truth: Callable[[str], Truth]
) -> None:
    truth = make_truth(kind)
    chain = split(truth.folder, 2)
    first = prompt_of(70)
    second = [*first[:64], *prompt_of(30)]
    chain.prefill(first, blocks=[9, 3, 8, 1, 5])
    rest = Piece(second[64:], 64, len(second), [9, 3, 8, 1, 40, 41])
    (ours,) = chain.step([rest])
    assert error(ours, truth.logits(second)[64:]) < TOLERANCE
    # ... and the first goes on as if nobody had come.
    (next_of_first,) = chain.step([Piece([7], 70, 70, [9, 3, 8, 1, 5])])
    assert error(next_of_first[0], truth.logits([*first, 7])[-1]) < TOLERANCE


@pytest.mark.parametrize("length", [57, 63, 64, 65, 66])
@pytest.mark.parametrize("kind", LONGROPE)
def test_longrope_changes_its_factors_while_generating(
    kind: str, length: int, make_truth: Callable[[str], Truth]
) -> None:
    truth = make_truth(kind)
    chain = split(truth.folder, 2)
    assert chain.entry.rope_switch == 64
    assert chain.generate([prompt_of(length)], 16) == [truth.tokens(prompt_of(length), 16)]


def test_longrope_sequences_on_both_sides_of_the_switch_share_steps(
    make_truth: Callable[[str], Truth],
) -> None:
    truth = make_truth("phi35_longrope")
    prompts = [prompt_of(length) for length in (10, 60, 63, 64, 65, 130)]
    chain = split(truth.folder, 3)
    assert chain.generate(prompts, 10, chunk_tokens=25) == [truth.tokens(it, 10) for it in prompts]


def test_growing_rotary_tables_do_not_depend_on_what_was_computed_before(
    make_truth: Callable[[str], Truth],
) -> None:
    """Dynamic NTK: every prompt gets the tables of its own length, in any order."""
    truth = make_truth("llama_dynamic_rope")
    chain = split(truth.folder, 2)
    for length in (200, 40, 64, 65, 120, 7):
        prompt = prompt_of(length)
        assert error(chain.prefill(prompt, chunk_tokens=50), truth.logits(prompt)) < TOLERANCE
    prompts = [prompt_of(length) for length in (60, 64, 65, 150)]
    assert chain.generate(prompts, 8) == [truth.tokens(it, 8) for it in prompts]


def test_only_promised_kinds_have_promised_names() -> None:
    assert not PROMISED.keys() & OTHERS.keys()
    assert len(PROMISED) >= 20
