"""`manager top` and `manager chat` with a server, and the shell's Tab."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.chains import Answer, Workers, manager
from tests.support.processes import ROOT, clean_environment
from tests.support.serving import Server


def test_top_shows_every_worker(
    call: Callable[..., Answer], server: Server, workers: Workers
) -> None:
    answer = call("top", "--once", "--server", server.url, env={"COLUMNS": "160"})
    assert answer.returncode == 0, answer.stderr
    assert "ready" in answer.stdout and "tokens/s" in answer.stdout
    assert all(address in answer.stdout for address in workers.addresses)


def test_chat_answers_and_obeys(server: Server) -> None:
    lines = ["the quick", "/undo", "/system Be brief.", "the lazy \\", "dog", "/reset", "/help"]
    answer = manager(
        *("chat", "--server", server.url, "--max-new-tokens", "6", "--seed", "3", "--ignore-eos"),
        stdin="\n".join([*lines, "/nothing", "/quit", "never read"]) + "\n",
    )
    assert answer.returncode == 0, answer.stderr
    assert "2 messages are left" not in answer.stderr and "0 messages are left" in answer.stderr
    assert "forgotten" in answer.stderr and "/nothing is none of the commands" in answer.stderr
    said, _, help_text = answer.stdout.partition("/help ")
    assert said.strip() and "/reset" in help_text


@pytest.mark.parametrize("command", ["top", "chat"])
def test_no_server_is_one_sentence(call: Callable[..., Answer], command: str) -> None:
    answer = call(command, "--server", "http://127.0.0.1:9")
    assert answer.returncode == 1 and "no server answers at http://127.0.0.1:9" in answer.stderr
    assert answer.stderr.count("\n") == 1
    bad = call(command, "--server", "ftp://x")
    assert bad.returncode == 2 and "is no address" in bad.stderr


def test_an_unknown_model_is_refused_with_the_known_ones(
    call: Callable[..., Answer], server: Server
) -> None:
    answer = call("chat", "--server", server.url, "--model", "nobody")
    assert answer.returncode == 1 and f"the server has {server.model}" in answer.stderr


def test_tab_completes_commands_and_options() -> None:
    def completed(words: str, last: int) -> list[str]:
        variables = {
            "_MANAGER_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(last),
        }
        done = subprocess.run(
            [sys.executable, "-m", "manager"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            cwd=ROOT / "tests",
            env=clean_environment(variables),
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("manager ser", 1) == ["serve"]
    assert "task" not in completed("manager ", 1)
    assert "--max-concurrent" in completed("manager serve --max", 2)
