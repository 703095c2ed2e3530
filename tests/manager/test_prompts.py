"""Files of prompts: what is read from them, and what each bad line is told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.generation import GenerationOptions
from manager.prompts import Template, read_prompts
from proto.errors import UsageError

OPTIONS = GenerationOptions(max_new_tokens=64)


@pytest.fixture
def write(tmp_path):
    """Write a file of prompts; text, or objects for .jsonl."""

    def write(name, content):
        if isinstance(content, list):
            content = "".join(json.dumps(it) + "\n" for it in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, options=OPTIONS, template=None):
    """The sentence that reading this file ends with."""
    with pytest.raises(UsageError) as refused:
        read_prompts(path, options, template or Template())
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_text_file_has_a_prompt_a_line_and_blank_lines_are_none(write):
    rows = read_prompts(write("p.txt", "one\n\n  two \r\n \t\nthree"), OPTIONS)
    assert [(row.index, row.line, row.prompt) for row in rows] == [
        (0, 1, "one"),
        (1, 3, "  two "),
        (2, 5, "three"),
    ]
    assert {row.options for row in rows} == {OPTIONS}
    assert {(row.id, row.messages) for row in rows} == {(None, None)}


def test_a_line_ends_at_a_line_feed_and_not_at_what_unicode_calls_one(write):
    rows = read_prompts(write("p.txt", "a\u2028b\x0cc\x85d\n"), OPTIONS)
    assert [row.prompt for row in rows] == ["a\u2028b\x0cc\x85d"]


def test_a_byte_order_mark_belongs_to_no_prompt(write):
    content = "\ufeffdef main():\n".encode()
    assert read_prompts(write("p.txt", content), OPTIONS)[0].prompt == "def main():"


def test_a_json_row_keeps_its_id_and_sets_its_own_options(write):
    row = {
        "id": "q-7",
        "prompt": "x",
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 11,
        "stop": ["\n", "end"],
    }
    plain = {"prompt": "y", "id": 12, "seed": None}
    rows = read_prompts(write("p.jsonl", [row, plain]), OPTIONS)
    assert rows[0].id == "q-7"
    assert rows[0].options == GenerationOptions(
        max_new_tokens=5,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=11,
        stop=("\n", "end"),
    )
    assert (rows[1].id, rows[1].options) == (12, OPTIONS)


def test_one_stop_text_needs_no_list(write):
    rows = read_prompts(write("p.jsonl", [{"prompt": "x", "stop": "\n\n"}]), OPTIONS)
    assert rows[0].options.stop == ("\n\n",)


def test_messages_are_kept_as_they_are_and_take_no_system_text(write):
    messages = [{"role": "user", "content": "hi"}]
    template = Template(chat=True, system="Be brief.")
    rows = read_prompts(write("p.jsonl", [{"messages": messages}]), OPTIONS, template)
    assert rows[0].messages == tuple(messages)
    assert rows[0].prompt is None


def test_chat_makes_a_conversation_of_a_plain_prompt(write):
    path = write("p.txt", "hi\n")
    only, told = (read_prompts(path, OPTIONS, it)[0] for it in (Template(chat=True), CHAT))
    assert only.messages == ({"role": "user", "content": "hi"},)
    assert told.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    )


CHAT = Template(chat=True, system="Be brief.")


def test_a_system_text_without_a_conversation_is_refused():
    with pytest.raises(UsageError, match="--chat"):
        Template(system="Be brief.")


def test_columns_of_a_data_set_do_no_harm(write):
    row = {"prompt": "x", "completion": "y", "category": 3, "text": "z", "messages_id": 1}
    assert read_prompts(write("p.jsonl", [row]), OPTIONS)[0].prompt == "x"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_tokens", "max_new_tokens"),
        ("max_new_token", "max_new_tokens"),
        ("temprature", "temperature"),
        ("top-k", "top_k"),
        ("repetition_penality", "repetition_penalty"),
    ],
)
def test_an_option_under_a_wrong_name_is_not_passed_over(write, key, meant):
    sentence = refusal(write("p.jsonl", [{"prompt": "x", key: 1}]))
    assert f"unknown key {key!r}: write {meant!r}" in sentence


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('"text"', '"text" is no object'),
        ("[" * 100_000, "nested too deep"),
        ("{}", "either 'prompt' or 'messages', this one has neither"),
        ('{"prompt": "a", "messages": []}', "this one has both"),
        ('{"prompt": 3}', "prompt is 3; it takes a text"),
        ('{"prompt": "\\ud83d!"}', "prompt has half a character, '\\ud83d'"),
        ('{"messages": []}', "messages is []; it takes a list of at least one message"),
        ('{"messages": "hi"}', 'messages is "hi"'),
        ('{"messages": ["hi"]}', '"hi" is no message'),
        ('{"messages": [{"role": "user"}]}', '{"role": "user"} is no message'),
        ('{"messages": [{"role": "user", "content": null}]}', "content of a message is null"),
        ('{"prompt": "a", "id": [1]}', "id is [1]; it takes a text or a whole number"),
        ('{"prompt": "a", "id": true}', "id is true"),
        ('{"prompt": "a", "stop": 3}', "stop is 3; it takes a text or a list of texts"),
        ('{"prompt": "a", "stop": [3]}', "a stop text is 3"),
        ('{"prompt": "a", "stop": ""}', "a stop text is empty"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot'"),
        ('{"prompt": "a", "max_new_tokens": 1.5}', "max_new_tokens is 1.5"),
        ('{"prompt": "a", "seed": -1}', "seed is -1"),
        ('{"text": "a"}', "unknown key 'text': write 'prompt'"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write, line, said):
    path = write("p.jsonl", '{"prompt": "good"}\n\n' + line + "\n")
    sentence = refusal(path)
    assert sentence.startswith(f"{path}:3: ")
    assert said in sentence


def test_a_long_value_is_cut_in_the_sentence(write):
    assert len(refusal(write("p.jsonl", [{"prompt": ["x"] * 1000}]))) < 300


def test_bytes_that_are_no_utf8_are_named_by_line_and_byte(write):
    path = write("p.txt", b"fine\ncaf\xe9\n")
    assert f"{path}:2: byte 4 of the line (0xe9) is not UTF-8" in refusal(path)


def test_a_file_that_is_not_there_is_empty_a_folder_or_of_no_known_kind_is_refused(write, tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.txt")
    assert "has no prompt in it" in refusal(write("blank.txt", "\n  \n"))
    (tmp_path / "folder.txt").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.txt")
    assert "must end in .txt" in refusal(write("p.csv", "a,b"))


def test_the_key_changes_with_all_that_a_text_depends_on_and_with_nothing_else(write):
    messages = [{"role": "user", "content": "x"}]
    different = [
        {"prompt": "x"},
        {"prompt": "y"},
        {"messages": messages},
        {"prompt": "x", "seed": 1},
        {"prompt": "x", "stop": "y"},
    ]
    keys = [row.key for row in read_prompts(write("p.jsonl", different), OPTIONS)]
    assert len(set(keys)) == len(different)
    renamed = read_prompts(write("q.jsonl", [{"prompt": "y"}, {"id": 9, "prompt": "x"}]), OPTIONS)
    assert renamed[1].key == keys[0]
    assert replace(renamed[1], options=replace(OPTIONS, max_new_tokens=65)).key != keys[0]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_any_prompts_come_back_as_they_were_written(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": it}) + "\n" for it in prompts), encoding="utf-8")
    assert [row.prompt for row in read_prompts(path, OPTIONS)] == prompts


def test_a_row_names_its_adapter_or_none_at_all(write):
    path = write(
        "p.jsonl",
        [
            {"prompt": "a"},
            {"prompt": "a", "adapter": "law"},
            {"prompt": "a", "adapter": ""},
            {"prompt": "a", "adapter": None},
        ],
    )
    rows = read_prompts(path, replace(OPTIONS, adapter="medicine"))
    assert [row.options.adapter for row in rows] == ["medicine", "law", None, "medicine"]
    plain = read_prompts(path, OPTIONS)
    assert [row.options.adapter for row in plain] == [None, "law", None, None]
    assert rows[0].key != plain[0].key == plain[2].key == rows[2].key


@pytest.mark.parametrize("adapter", [5, True, ["law"], {"name": "law"}])
def test_an_adapter_is_a_name(adapter, write):
    said = refusal(write("p.jsonl", [{"prompt": "a", "adapter": adapter}]))
    assert "it takes an adapter's name" in said and "p.jsonl:1" in said
