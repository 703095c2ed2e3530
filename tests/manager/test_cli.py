"""The `manager` command without any worker: help, spelling, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from manager.cli import COMMANDS, main
from tests.support.processes import ROOT, clean_environment

HEAVY = ("torch", "transformers", "numpy", "uvloop", "tokenizers", "rich")


def run(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_heavy(command):
    words = [*([command] if command else []), "--help"]
    script = (
        "import sys\nfrom manager.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    print('loaded', *sorted(sys.modules), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=clean_environment(),
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "Usage: manager" in answer.stdout
    loaded = {name.partition(".")[0] for name in answer.stderr.split()[1:]}
    assert loaded.isdisjoint(HEAVY)


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    shown = {name for name, (_, _, summary) in COMMANDS.items() if summary}
    assert all(name in out for name in shown)
    assert "task" not in out, "what only scripts call is not for people"


@pytest.mark.parametrize("option", ["--max_new_tokens", "--max-new-tokens"])
def test_options_may_be_spelled_either_way(capsys, option):
    code, out, err = run(capsys, "generate", "x", option, "none")
    assert (code, out) == (2, "")
    assert "'none' is not a valid integer" in err


def test_an_unknown_command_or_option_is_one_line(capsys):
    for words in (["frobnicate"], ["generate", "x", "--frobnicate"], ["generate"]):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith("manager: ")
        assert len(err.splitlines()) == 1


def test_a_traceback_is_shown_for_debug_only_wherever_it_stands(capsys):
    bad = ["generate", "x", "--workers", "nowhere"]
    assert "Traceback" not in run(capsys, *bad)[2]
    for words in (["--debug", *bad], [*bad, "--debug"]):
        code, _, err = run(capsys, *words)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("manager: ")


def test_the_version_is_told(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("comboio")
