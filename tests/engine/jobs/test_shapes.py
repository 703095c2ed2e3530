"""Rows are recognised by their columns, and checked value by value."""

from __future__ import annotations

import pytest

from engine.jobs.rows import DataError, Place
from engine.jobs.settings import DataSettings
from engine.jobs.shapes import Conversation, Exchange, Text, Tokens, find_shape

PLACE = Place("data.jsonl", 7)


def make(row, **settings):
    shape = find_shape(PLACE, row, DataSettings(**settings))
    return shape.name, shape.make(PLACE, row)


def instruction(question, answer):
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(messages, is_instruction=True)


@pytest.mark.parametrize(
    ("row", "name", "sample"),
    [
        ({"text": "x"}, "text", Text("x")),
        ({"prompt": "p", "completion": "c"}, "prompt+completion", Exchange("p", "c")),
        ({"prompt": "p", "response": "c", "text": "t"}, "prompt+completion", Exchange("p", "c")),
        (
            {"problem statement": "p", "solution": "s", "language": "Cuda", "seed": "y"},
            "hpc-instruct",
            instruction("p", "s"),
        ),
        (
            {"lang": "cpp", "raw_index": 1, "index": 2, "seed": "y", "problem": "p",
             "openai_fingerprint": "z", "solution": "s"},
            "magicoder",
            instruction("p", "s"),
        ),
        ({"instruction": "i", "output": "o"}, "evol-instruct", instruction("i", "o")),
        (
            {"instruction": "i", "input": "n", "output": "o", "text": "all"},
            "evol-instruct",
            instruction("i\n\nn", "o"),
        ),
        ({"instruction": "i", "response": "o"}, "instruction", instruction("i", "o")),
        ({"question": "i", "answer": "o"}, "instruction", instruction("i", "o")),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "tokens", Tokens((1, 2), None)),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens", Tokens((1, 2), (-100, 2))),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            "messages",
            Conversation(({"role": "user", "content": "hi"},)),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt-4", "value": "b"}]},
            "messages",
            Conversation(
                ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
            ),
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            "prompt+completion",
            Conversation(
                ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}),
                learn_from=1,
            ),
        ),
    ],
)  # fmt: skip
def test_columns_say_what_a_row_is(row, name, sample):
    assert make(row) == (name, sample)


def test_columns_of_other_names_are_named_by_options():
    assert make({"content": "x"}, text_column="content") == ("text", Text("x"))
    found = make({"q": "p", "a": "c"}, prompt_column="q", completion_column="a")
    assert found == ("prompt+completion", Exchange("p", "c"))


@pytest.mark.parametrize(
    "row",
    [
        {"text": " \n"},
        {"prompt": "x", "completion": ""},
        {"instruction": "", "output": "x"},
        {"messages": []},
        {"input_ids": []},
    ],
)
def test_a_row_with_nothing_in_it_gives_no_sample(row):
    assert make(row)[1] is None


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": None}, r"'text' is null: it takes a text"),
        ({"text": 3}, r"'text' is 3: it takes a text"),
        ({"prompt": "x", "completion": None}, r"'completion' is null"),
        ({"messages": "x"}, r"'messages' is \"x\": it takes a list of messages"),
        ({"messages": [{"role": "user"}]}, r"message 1 of 'messages' .*takes a role and a content"),
        ({"messages": [7]}, r"message 1 of 'messages' is 7: it takes an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "has parts that are no text",
        ),
        ({"input_ids": [1, "a"]}, r"'input_ids' has \"a\" at 1"),
        ({"input_ids": [1, -5]}, r"'input_ids' has -5 at 1"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"prose": "x"}, r"the columns 'prose' are of no known shape: name yours with --text-col"),
    ],
)
def test_a_bad_value_is_said_with_its_place(row, sentence):
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: .*{sentence}"):
        make(row)


def test_a_column_that_later_rows_lack_is_said_with_a_guess():
    shape = find_shape(PLACE, {"prompt": "", "completion": ""}, DataSettings())
    with pytest.raises(DataError, match=r"data\.jsonl:8: there is no 'completion' .*'completions'"):
        shape.make(Place("data.jsonl", 8), {"prompt": "x", "completions": "y"})


def test_an_option_for_a_column_that_is_not_there_is_said():
    with pytest.raises(DataError, match=r"--text-column 'txt' is no column .*did you mean 'text'"):
        make({"text": "x"}, text_column="txt")
