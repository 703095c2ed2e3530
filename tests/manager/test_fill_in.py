"""Prompts with a gap, in the order that each family of models wants; and models without."""

from __future__ import annotations

from typing import Any

import pytest

from manager.serve.fill_in import FAMILIES, Family, find_gap
from tests.support.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

VOCAB_SIZE = 1000
PROMPT, SUFFIX = "the quick ", " the lazy dog"


def tokenizer_with(family: Family, made: Any) -> Any:
    names = [family.prefix, family.suffix, family.middle, *family.ends]
    made.add_special_tokens(
        {"additional_special_tokens": list(dict.fromkeys(it for it in names if it))}
    )
    return made


def family_of(prefix: str) -> Family:
    return next(it for it in FAMILIES if it.prefix == prefix)


@pytest.mark.parametrize(
    ("prefix", "text"),
    [
        ("<|fim_prefix|>", "<|fim_prefix|>{0}<|fim_suffix|>{1}<|fim_middle|>"),
        ("<fim_prefix>", "<fim_prefix>{0}<fim_suffix>{1}<fim_middle>"),
        ("<fim-prefix>", "<fim-prefix>{0}<fim-suffix>{1}<fim-middle>"),
        ("<｜fim▁begin｜>", "<｜fim▁begin｜>{0}<｜fim▁hole｜>{1}<｜fim▁end｜>"),
        ("[PREFIX]", "[SUFFIX]{1}[PREFIX]{0}"),
    ],
)
def test_a_gap_is_written_as_the_models_documentation_writes_it(prefix: str, text: str) -> None:
    tokenizer = tokenizer_with(family_of(prefix), byte_level_tokenizer())
    gap = find_gap(tokenizer, VOCAB_SIZE)
    assert gap is not None
    wanted = tokenizer(text.format(PROMPT, SUFFIX), add_special_tokens=False)["input_ids"]
    assert gap.prompt(PROMPT, SUFFIX) == tuple(wanted)
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert gap.prompt(tuple(ids), SUFFIX) == tuple(wanted)


def test_code_llamas_suffix_has_no_space_before_it_and_its_prefix_has() -> None:
    family = family_of("▁<PRE>")
    tokenizer = tokenizer_with(family, byte_fallback_tokenizer())
    gap = find_gap(tokenizer, VOCAB_SIZE)
    assert gap is not None
    spaced = {it: tokenizer(it, add_special_tokens=False)["input_ids"] for it in ("the", "fox")}
    assert tokenizer.convert_ids_to_tokens(spaced["fox"])[0] == "▁"
    wanted = (gap.prefix, *spaced["the"], gap.suffix, *spaced["fox"][1:], gap.middle)
    assert gap.prompt("the", "fox") == wanted
    assert tokenizer.convert_ids_to_tokens(list(gap.end_tokens)) == ["▁<EOT>"]


def test_what_the_tokenizer_puts_before_every_text_stands_there_once() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(family_of("<|fim_prefix|>"), byte_level_tokenizer())
    tokenizer.bos_token = "<|user|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", bos)]
    )
    gap = find_gap(tokenizer, VOCAB_SIZE)
    assert gap is not None
    made = gap.prompt(PROMPT, SUFFIX)
    assert made[0] == bos and made.count(bos) == 1 and made[1] == gap.prefix
    assert gap.prompt(tuple(tokenizer(PROMPT)["input_ids"]), SUFFIX) == made


def test_other_tokens_of_the_family_end_the_text_in_the_gap() -> None:
    tokenizer = tokenizer_with(family_of("<|fim_prefix|>"), byte_level_tokenizer())
    gap = find_gap(tokenizer, VOCAB_SIZE)
    assert gap is not None
    names = tokenizer.convert_ids_to_tokens(list(gap.end_tokens))
    assert "<|file_separator|>" in names and "<|fim_prefix|>" in names


def test_a_tokenizer_without_such_tokens_has_no_gap() -> None:
    assert find_gap(byte_level_tokenizer(), VOCAB_SIZE) is None
    assert find_gap(byte_fallback_tokenizer(), VOCAB_SIZE) is None
    assert find_gap(None, VOCAB_SIZE) is None


def test_a_token_that_the_model_has_no_row_for_counts_for_nothing() -> None:
    tokenizer = tokenizer_with(family_of("<|fim_prefix|>"), byte_level_tokenizer())
    assert find_gap(tokenizer, len(byte_level_tokenizer())) is None
