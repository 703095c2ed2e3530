"""Texts with a gap: a prompt before it, a suffix behind it, and the model writes what is between.

Models that learnt this have tokens which say where the parts begin. The known ones stand here, in
the order that each family's documentation gives; whether a model has them, its tokenizer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

# Some tokenizers put a space before every text; behind another character they do not.
SOMETHING: Final = "☺"


@dataclass(frozen=True, slots=True)
class Family:
    """How some models mark a gap."""

    prefix: str
    suffix: str
    middle: str | None  # None: the suffix comes first, and the text goes on behind the prefix
    ends: tuple[str, ...] = ()  # end the text in the gap, beside the model's end tokens
    is_spaced: bool = False  # its tokenizer puts a space before each text; a suffix has none


FAMILIES: Final = (
    # Qwen2.5-Coder, CodeGemma, Granite
    Family(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        (
            *("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"),
            *("<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<|endoftext|>"),
        ),
    ),
    # StarCoder, StarCoder2, StableCode
    Family(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        (
            *("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>"),
            *("<file_sep>", "<|endoftext|>"),
        ),
    ),
    # SantaCoder
    Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>",)),
    # Code Llama
    Family("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",), is_spaced=True),
    # DeepSeek-Coder
    Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    # Codestral
    Family("[PREFIX]", "[SUFFIX]", None, is_spaced=True),
)


@dataclass(frozen=True, slots=True)
class Gap:
    """How one model marks a gap, in its own token ids."""

    prefix: int
    suffix: int
    middle: int | None
    end_tokens: tuple[int, ...]
    is_spaced: bool
    tokenizer: Any

    def prompt(self, prompt: str | Sequence[int], suffix: str) -> tuple[int, ...]:
        """The tokens behind which the model writes what is between the two."""
        begin, before = self._begin(), self._ids(prompt) if isinstance(prompt, str) else [*prompt]
        if begin and before[:1] == begin:  # token ids may have it already
            before = before[1:]
        behind = self._suffix_ids(suffix)
        if self.middle is None:
            return (*begin, self.suffix, *behind, self.prefix, *before)
        return (*begin, self.prefix, *before, self.suffix, *behind, self.middle)

    def _begin(self) -> list[int]:
        """What the tokenizer puts before every text."""
        ids = [int(it) for it in self.tokenizer("", verbose=False)["input_ids"]]
        return ids[:1] if ids and ids[0] == self.tokenizer.bos_token_id else []

    def _suffix_ids(self, suffix: str) -> list[int]:
        if self.is_spaced:
            ids, before = self._ids(SOMETHING + suffix), self._ids(SOMETHING)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._ids(suffix)

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return [int(it) for it in encoded["input_ids"]]


def find_gap(tokenizer: Any, vocab_size: int) -> Gap | None:
    """How a tokenizer's model marks a gap; None where no known tokens are in it."""
    if tokenizer is None:
        return None

    def token(text: str) -> int | None:
        found = tokenizer.convert_tokens_to_ids(text)
        is_there = isinstance(found, int) and 0 <= found < vocab_size
        return found if is_there and tokenizer.convert_ids_to_tokens(found) == text else None

    for family in FAMILIES:
        prefix, suffix = token(family.prefix), token(family.suffix)
        middle = None if family.middle is None else token(family.middle)
        if prefix is None or suffix is None or (family.middle is not None and middle is None):
            continue
        ends = tuple(it for it in map(token, family.ends) if it is not None)
        return Gap(prefix, suffix, middle, ends, family.is_spaced, tokenizer)
    return None
