"""What README.md says of files, recipes, commands and models is so; README.pt-BR.md says the same.

Its commands for one and for two machines are run by tests/e2e/test_two_boards.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRANSLATION = (ROOT / "README.pt-BR.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "README.pt-BR.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "bench/README.md",
]
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    folder = (ROOT / page).parent
    assert [
        target for target in targets if "://" not in target and not (folder / target).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_recipes_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    recipes = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)`|^ *make ([a-z-]+)", text, re.MULTILINE))
    assert {one or other for one, other in named} <= recipes


def test_the_table_of_commands_has_every_command():
    from manager.cli import COMMANDS

    listed = set(re.findall(r"^\| `manager ([\w-]+)` \|", README, re.MULTILINE))
    assert listed == {name for name, (_, _, summary) in COMMANDS.items() if summary}


@pytest.mark.parametrize("text", [README, TRANSLATION], ids=["english", "portuguese"])
def test_the_models_it_lists_are_the_ones_that_the_tests_try(text):
    from tests.support.models import KINDS

    section = re.search(r"<!-- architectures: begin -->(.*?)<!--", text, re.DOTALL)
    assert section is not None
    without_remarks = re.sub(r"\([^)]*\)", "", section[1])
    listed = {plain(name) for name in without_remarks.split(",")}
    tried = {plain(name).removesuffix("config") for name, _ in KINDS.values()}
    assert listed == {name.removesuffix("text") for name in tried}


def test_the_translation_has_the_same_levels_of_headings():
    def levels(text: str) -> list[str]:
        return re.findall(r"^(#+) ", prose(text), re.MULTILINE)

    assert levels(TRANSLATION) == levels(README)


def test_the_translation_has_the_same_blocks_of_code():
    assert FENCE.findall(TRANSLATION) == FENCE.findall(README)


def test_the_translation_has_the_same_markers_around_the_same_blocks():
    def outline(text: str) -> list[str]:
        return re.findall(r"<!--.*?-->|^```\w*$|^#+(?= )", text, re.MULTILINE | re.DOTALL)

    assert outline(TRANSLATION) == outline(README)


def test_the_translation_names_the_same_commands_files_and_options():
    def words_in_code(text: str) -> list[str]:
        return sorted(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text)))

    assert words_in_code(TRANSLATION) == words_in_code(README)


def test_the_translation_links_to_the_same_places():
    def targets(text: str) -> list[str]:
        return sorted(re.findall(r"\]\(([^)#]+)", prose(text)))

    here, there = targets(README), targets(TRANSLATION)
    here.remove("README.pt-BR.md")
    there.remove("README.md")
    assert there == here


def test_links_to_headings_lead_to_a_heading_of_the_same_page():
    for text in (README, TRANSLATION):
        headings = {anchor(title) for title in re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)}
        assert set(re.findall(r"\]\(#([^)]+)\)", prose(text))) <= headings


def test_the_tables_of_the_translation_have_the_same_numbers():
    def rows(text: str) -> list[list[str]]:
        return [numbers(row) for row in re.findall(r"^\|.*$", prose(text), re.MULTILINE)]

    assert rows(TRANSLATION) == rows(README)


def test_the_text_of_the_translation_has_the_same_numbers():
    assert sorted(numbers(prose(TRANSLATION))) == sorted(numbers(prose(README)))


def plain(name: str) -> str:
    """`GPT-NeoX` and `GPTNeoX` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def prose(text: str) -> str:
    """The page without its blocks of code, where a `#` begins a comment."""
    return FENCE.sub("", text)


def numbers(text: str) -> list[str]:
    """As English writes them: Portuguese has a comma where English has the point."""
    return [number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)*", text)]


def anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
