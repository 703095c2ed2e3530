"""Incremental text: joined it is what decoding everything at once gives; nothing is taken back."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.text import REPLACEMENT, Detokenizer, StopFinder, TextStream, Vocabulary
from tests.support.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

KINDS = {"byte level": byte_level_tokenizer, "byte fallback": byte_fallback_tokenizer}
NUM_IDS = 268  # both vocabularies have at least so many

ids = st.lists(st.integers(0, NUM_IDS - 1), max_size=40)
texts = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


@cache
def vocabulary(kind: str) -> tuple[Any, Vocabulary]:
    tokenizer = KINDS[kind]()
    return tokenizer, Vocabulary(tokenizer)


def pieces_of(kind: str, token_ids: list[int], context: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary(kind)[1], context)
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.flush()]


def whole(kind: str, token_ids: list[int]) -> str:
    text = vocabulary(kind)[0].decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("kind", KINDS)
@given(token_ids=ids)
def test_pieces_joined_are_the_whole_text(kind, token_ids):
    assert "".join(pieces_of(kind, token_ids, [])) == whole(kind, token_ids)


@pytest.mark.parametrize("kind", KINDS)
@given(token_ids=ids, context=ids)
def test_text_that_continues_a_prompt_keeps_its_spaces(kind, token_ids, context):
    letter = vocabulary(kind)[0].convert_tokens_to_ids("s")
    context = [*context, letter]  # a prompt that ends in a whole character
    joined = "".join(pieces_of(kind, token_ids, context))
    assert whole(kind, [letter]) + joined == whole(kind, [letter, *token_ids])


@pytest.mark.parametrize("kind", KINDS)
@given(token_ids=ids)
def test_no_piece_says_what_the_text_up_to_then_may_still_take_back(kind, token_ids):
    given = ""
    for count, piece in enumerate(pieces_of(kind, token_ids, [])[:-1], start=1):
        given += piece
        assert whole(kind, token_ids).startswith(given)
        assert whole(kind, token_ids[:count]).startswith(given)


@given(text=st.text(min_size=1, max_size=12))
def test_a_character_never_comes_in_halves(text):
    tokenizer, _ = vocabulary("byte level")
    pieces = pieces_of("byte level", tokenizer(text)["input_ids"], [])
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)


def test_a_special_token_that_is_shown_stands_where_it_came():
    tokenizer, words = vocabulary("byte fallback")
    the, fox, end = tokenizer.convert_tokens_to_ids(["▁the", "▁fox", "<|end|>"])
    detokenizer = Detokenizer(words, shown={end: "<|end|>"})
    pieces = [detokenizer.add(token) for token in (the, end, end, fox)]
    assert pieces == ["the", "<|end|>", "<|end|>", " fox"]


@given(token_ids=ids)
def test_a_character_does_not_go_on_behind_a_shown_token(token_ids):
    tokenizer, words = vocabulary("byte level")
    end = tokenizer.eos_token_id
    detokenizer = Detokenizer(words, shown={end: "<|end|>"})
    joined = "".join([*(detokenizer.add(token) for token in token_ids), detokenizer.flush()])
    parts: list[list[int]] = [[]]
    for token in token_ids:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    assert joined == "<|end|>".join(whole("byte level", part) for part in parts)


def test_special_tokens_are_silent():
    tokenizer, words = vocabulary("byte level")
    detokenizer = Detokenizer(words)
    assert detokenizer.add(tokenizer.eos_token_id) == ""
    assert detokenizer.add(tokenizer("a")["input_ids"][0]) == "a"


def test_a_first_word_keeps_its_space_only_where_it_continues_text():
    tokenizer, words = vocabulary("byte fallback")
    fox = tokenizer.convert_tokens_to_ids("▁fox")
    the = tokenizer.convert_tokens_to_ids("▁the")
    assert Detokenizer(words).add(fox) == "fox"
    assert Detokenizer(words, context=[the]).add(fox) == " fox"


@given(text=texts, cuts=st.lists(st.integers(0, 30)), wanted=stops)
def test_stop_texts_do_not_depend_on_where_pieces_end(text, cuts, wanted):
    assert shown(split(text, cuts), wanted) == shown(list(text), wanted)


@given(text=texts, cuts=st.lists(st.integers(0, 30)), wanted=stops)
def test_what_is_shown_is_the_text_up_to_the_first_complete_stop_text(text, cuts, wanted):
    joined, stopped_by = shown(split(text, cuts), wanted)
    assert not any(stop in joined for stop in wanted)
    if stopped_by is None:
        assert joined == text
    else:
        assert text.startswith(joined + stopped_by)


@given(text=texts, wanted=stops)
def test_no_more_is_held_back_than_a_stop_text_could_take(text, wanted):
    finder, given = StopFinder(wanted), ""
    for at, char in enumerate(text):
        cut = finder.add(char)
        given += cut.text
        if cut.stopped_by:
            return
        held = text[len(given) : at + 1]
        assert held == "" or any(stop.startswith(held) for stop in wanted)


def test_a_stop_text_across_token_borders_ends_the_stream():
    tokenizer, words = vocabulary("byte level")
    stream = TextStream(words, ["fox jumps"])
    cuts = [stream.add(token) for token in tokenizer("the brown fox jumps over")["input_ids"]]
    ends = [cut.stopped_by for cut in cuts if cut.stopped_by]
    assert ends == ["fox jumps"]
    assert (
        "".join(cut.text for cut in cuts[: cuts.index(next(c for c in cuts if c.stopped_by)) + 1])
        == "the brown "
    )


def test_the_beginning_of_a_stop_text_is_text_when_nothing_follows():
    tokenizer, words = vocabulary("byte level")
    stream = TextStream(words, ["dogma"])
    shown_so_far = "".join(stream.add(token).text for token in tokenizer("lazy dog")["input_ids"])
    assert shown_so_far == "lazy "
    assert stream.flush().text == "dog"


def split(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


def shown(pieces: list[str], wanted: list[str]) -> tuple[str, str | None]:
    finder, joined = StopFinder(wanted), ""
    for piece in pieces:
        cut = finder.add(piece)
        joined += cut.text
        if cut.stopped_by:
            return joined, cut.stopped_by
    return joined + finder.flush(), None
