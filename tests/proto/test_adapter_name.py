"""What adapters may be called, and NAME=DIR."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.adapter_name import is_adapter_name, parse_adapter, split_adapters
from proto.errors import UsageError
from proto.messages import MAX_ADAPTER_NAME_CHARS

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,20}", fullmatch=True)
FOLDERS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(
    str.strip
)


@given(NAMES, FOLDERS)
def test_a_name_and_a_folder_come_out_as_they_went_in(name, folder):
    assert parse_adapter(f"{name}={folder}") == (name, folder)


@given(st.lists(st.tuples(NAMES, FOLDERS.filter(lambda it: "," not in it)), min_size=1, max_size=4))
def test_a_list_in_one_setting_is_cut_where_the_next_name_begins(pairs):
    text = ",".join(f"{name}={folder}" for name, folder in pairs)
    assert [parse_adapter(it) for it in split_adapters(text)] == pairs


def test_a_comma_within_a_folder_is_part_of_it():
    assert split_adapters("a=/x,y,b=/z") == ("a=/x,y", "b=/z")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", ".a", "ä", "a\n", "~a", "a,b"])
def test_what_could_be_taken_for_something_else_is_no_name(name):
    assert not is_adapter_name(name)
    with pytest.raises(UsageError):
        parse_adapter(f"{name}=/x")


def test_a_name_has_a_longest_length():
    assert is_adapter_name("a" * MAX_ADAPTER_NAME_CHARS)
    assert not is_adapter_name("a" * (MAX_ADAPTER_NAME_CHARS + 1))


@pytest.mark.parametrize("text", ["a", "a=", "a= ", "=", ""])
def test_what_is_no_name_and_folder_is_quoted(text):
    with pytest.raises(UsageError) as refused:
        parse_adapter(text)
    assert repr(text) in str(refused.value)
