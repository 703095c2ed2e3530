"""What becomes of a sample's tokens, and which of them are learnt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from engine.jobs.rows import DataError, Place
from engine.jobs.settings import DataSettings
from engine.jobs.shapes import Conversation, Exchange, Text, Tokens
from engine.jobs.tokenizing import (
    HIDDEN_ANSWER,
    NO_ANSWER,
    NOT_LEARNT,
    NOTHING_LEARNT,
    PROMPT_FILLS,
    TOO_SHORT,
    Tokenizing,
)
from proto.errors import ModelError, UsageError
from tests.support.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

PLACE = Place("data.jsonl", 3)
CHAT = byte_level_tokenizer(chat=True)
PLAIN = byte_level_tokenizer()
TURNS = Conversation(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": " See you"},
    )
)


def tokenizing(tokenizer=PLAIN, max_length=4096, vocab_size=1000, **settings):
    return Tokenizing(tokenizer, "tiny", vocab_size, max_length, DataSettings(**settings))


def encode(sample, **settings):
    (outcome,) = tokenizing(**settings).encode([(PLACE, sample)])
    return outcome


def learnt(row, tokenizer=PLAIN):
    """(all of the text, the learnt part of it)."""
    assert len(row.ids) == len(row.labels)
    assert all(
        label in (NOT_LEARNT, token) for token, label in zip(row.ids, row.labels, strict=True)
    )
    chosen = [label for label in row.labels if label != NOT_LEARNT]
    return tokenizer.decode(row.ids), tokenizer.decode(chosen)


texts = st.text(st.sampled_from("the fox. é🙂\n日_"), max_size=20)


def test_running_text_is_learnt_whole_and_ends():
    (row,) = encode(Text("the quick fox")).rows
    assert learnt(row) == ("the quick fox<|end|>", "the quick fox<|end|>")


@given(texts, texts.filter(str.strip))
def test_of_an_exchange_the_answer_is_learnt_however_tokens_fall(prompt, answer):
    (row,) = encode(Exchange(prompt, answer)).rows
    assert learnt(row) == (f"{prompt}{answer}<|end|>", f"{answer}<|end|>")
    # Who prompts the model later tokenizes the prompt alone.
    ids = PLAIN(prompt)["input_ids"]
    assert row.ids[: len(ids)] == ids


@given(texts, texts.filter(str.strip))
def test_a_sentencepiece_tokenizer_gets_no_second_space_at_the_border(prompt, answer):
    tokenizer = byte_fallback_tokenizer()
    (row,) = encode(Exchange(prompt, answer), tokenizer=tokenizer).rows
    whole = tokenizer.decode(tokenizer(prompt + answer)["input_ids"])
    assert tokenizer.decode(row.ids[:-1]) == whole


def test_of_a_conversation_every_answer_is_learnt_with_its_end():
    (row,) = encode(TURNS, tokenizer=CHAT).rows
    text = (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello there<|end|>"
        "<|user|>Bye<|end|><|assistant|> See you<|end|>"
    )
    assert learnt(row, CHAT) == (text, "Hello there<|end|> See you<|end|>")


@given(st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=3))
def test_answers_of_any_conversation_are_found(pairs):
    messages = []
    for question, answer in pairs:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    (row,) = encode(Conversation(tuple(messages)), tokenizer=CHAT).rows
    answers = "".join(f"{answer}<|end|>" for _, answer in pairs)
    assert learnt(row, CHAT)[1] == answers


def test_only_the_completion_of_messages_is_learnt_where_it_is_apart():
    sample = Conversation(TURNS.messages, learn_from=3)
    (row,) = encode(sample, tokenizer=CHAT).rows
    assert learnt(row, CHAT)[1] == " See you<|end|>"


def test_an_instruction_is_written_by_the_chat_template_or_plainly():
    messages = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
    sample = Conversation(messages, is_instruction=True)
    (row,) = encode(sample, tokenizer=CHAT).rows
    assert learnt(row, CHAT)[0] == "<|user|>Why?<|end|><|assistant|>So.<|end|>"
    for tokenizer, template in ((PLAIN, "auto"), (CHAT, "plain")):
        (row,) = encode(sample, tokenizer=tokenizer, template=template).rows
        assert learnt(row, tokenizer) == (
            "### Instruction:\nWhy?\n\n### Response:\nSo.<|end|>",
            "So.<|end|>",
        )


def test_a_conversation_is_written_plainly_if_that_is_asked_for():
    (row,) = encode(TURNS, template="plain").rows
    assert learnt(row) == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello there\n\n"
        "### Instruction:\nBye\n\n### Response:\n See you<|end|>",
        "Hello there\n\n See you<|end|>",
    )


def test_a_slow_tokenizer_finds_the_answers_too():
    tokenizer = ByT5Tokenizer()
    (row,) = encode(TURNS, tokenizer=tokenizer, template="plain").rows
    assert learnt(row, tokenizer) == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello there\n\n"
        "### Instruction:\nBye\n\n### Response:\n See you</s>",
        "Hello there\n\n See you</s>",
    )
    (row,) = encode(Exchange("Why? ", "So."), tokenizer=tokenizer).rows
    assert learnt(row, tokenizer) == ("Why? So.</s>", "So.</s>")


def test_a_template_that_hides_earlier_answers_still_teaches_the_last():
    tokenizer = byte_level_tokenizer(chat=True)
    # As reasoning models do: what was thought in earlier turns is left out of the history.
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}"
        "(thought){% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    work = tokenizing(tokenizer)
    (outcome,) = work.encode([(PLACE, TURNS)])
    assert learnt(outcome.rows[0], tokenizer)[1] == "(thought) See you<|end|>"
    assert work.hidden_turns == 1


def test_a_template_that_shows_no_answer_drops_the_sample():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }}"
    assert encode(TURNS, tokenizer=tokenizer).dropped == HIDDEN_ANSWER


def test_loss_on_all_learns_the_prompts_as_well():
    (row,) = encode(Exchange("Why? ", "So."), loss_on="all").rows
    assert learnt(row)[1] == "Why? So.<|end|>"


def test_a_long_text_goes_on_in_more_rows():
    count = len(PLAIN("the fox " * 20)["input_ids"]) + 1
    for limit in range(3, count + 2):
        outcome = encode(Text("the fox " * 20), max_length=limit)
        lengths = [len(row.ids) for row in outcome.rows]
        assert set(lengths[:-2]) <= {limit} and min(lengths) >= 2 and max(lengths) <= limit
        assert "".join(PLAIN.decode(it.ids) for it in outcome.rows) == "the fox " * 20 + "<|end|>"


def test_a_long_answer_is_shortened_and_a_long_prompt_drops_the_sample():
    short = encode(Exchange("Why? ", "the fox " * 20), max_length=16)
    assert short.was_shortened and len(short.rows[0].ids) == 16
    assert encode(Exchange("the fox " * 20, "yes"), max_length=16).dropped == PROMPT_FILLS


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (Tokens((5,), None), TOO_SHORT),
        (Tokens((5, 6), (NOT_LEARNT, NOT_LEARNT)), NOTHING_LEARNT),
        (Tokens((5, 6), (5, NOT_LEARNT)), NOTHING_LEARNT),
        (Conversation(({"role": "user", "content": "x"},)), NO_ANSWER),
    ],
)
def test_what_teaches_nothing_is_dropped_with_the_reason(sample, reason):
    assert encode(sample, tokenizer=CHAT).dropped == reason


def test_token_ids_are_taken_as_they_are_without_a_tokenizer():
    work = tokenizing(None, vocab_size=10)
    first, second = work.encode(
        [(PLACE, Tokens((1, 9), None)), (PLACE, Tokens((1, 2, 3), (-100, -100, 3)))]
    )
    assert (list(first.rows[0].ids), list(first.rows[0].labels)) == ([1, 9], [1, 9])
    assert list(second.rows[0].labels) == [-100, -100, 3]


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (Tokens((1, 10), None), r"^data\.jsonl:3: input_ids has 10 at 1: tiny has .* 0 to 9"),
        (Tokens((1, 2), (1, 10)), r"^data\.jsonl:3: labels has 10 at 1"),
        (Tokens((1, 2), (1, -7)), r"^data\.jsonl:3: labels has -7 at 1"),
    ],
)
def test_token_ids_that_the_model_does_not_have_are_refused(sample, sentence):
    with pytest.raises(DataError, match=sentence):
        encode(sample, vocab_size=10)


def test_text_for_a_model_without_tokenizer_is_refused():
    with pytest.raises(ModelError, match=r"tiny has no tokenizer, and data\.jsonl:3 holds text"):
        encode(Text("x"), tokenizer=None)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    work = tokenizing(vocab_size=20)
    outcomes = work.encode([(PLACE, Text("the fox"))])
    with pytest.raises(ModelError, match=r"makes token id .*, and the model has 20"):
        work.check_vocabulary(outcomes)


@pytest.mark.parametrize("template", ["auto", "chat"])
def test_a_conversation_for_a_model_without_template_is_refused(template):
    with pytest.raises(UsageError, match=r"no chat template.*--template plain"):
        encode(TURNS, template=template)


def test_a_conversation_that_the_template_refuses_is_said_with_its_place():
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r"^data\.jsonl:3: the chat template .*roles must alternate"
    ):
        encode(TURNS, tokenizer=tokenizer)
