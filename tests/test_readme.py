"""What README.md says of files, recipes, commands and models is so.

Its commands for one and for two machines are run by tests/e2e/test_two_boards.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "bench/README.md"]


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
    recipes = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)`|^ *make ([a-z]+)", text, re.MULTILINE))
    assert {one or other for one, other in named} <= recipes


def test_the_table_of_commands_has_every_command():
    from manager.cli import COMMANDS

    listed = set(re.findall(r"^\| `manager (\w+)` \|", README, re.MULTILINE))
    assert listed == set(COMMANDS)


def test_the_models_it_lists_are_the_ones_that_the_tests_try():
    from tests.support.models import KINDS

    section = re.search(r"<!-- architectures: begin -->(.*?)<!--", README, re.DOTALL)
    assert section is not None
    without_remarks = re.sub(r"\([^)]*\)", "", section[1])
    listed = {plain(name) for name in without_remarks.split(",")}
    tried = {plain(name).removesuffix("config") for name, _ in KINDS.values()}
    assert listed == {name.removesuffix("text") for name in tried}


def plain(name: str) -> str:
    """`GPT-NeoX` and `GPTNeoX` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
