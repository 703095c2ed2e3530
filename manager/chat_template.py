"""Have conversations written by a model's chat template, within limits of time and memory.

One process does it (`manager.template_process`), started at the first conversation, and again when
a template was too much for it. Knows the tokenizer's attributes, no request and no token.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from engine.json_file import one_line

MAX_SECONDS: Final = 5.0  # of one core, for one text
_FILE: Final = Path(__file__).with_name("template_process.py")
# The process is ended after seconds of a core; on a machine that gives it none, after these.
_PATIENCE_S: Final = 120.0
_MAX_REQUEST_BYTES: Final = 64 * 2**20
_MAX_ANSWER_BYTES: Final = 256 * 2**20
# Nothing of the environment concerns a template but the time zone, and where Python finds jinja.
_ENVIRONMENT: Final = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_TIME", "TZ",
)  # fmt: skip
# Names under which a message's reasoning is known; templates read the first, a few the second.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class TemplateError(Exception):
    """A template did not take a conversation; says in a few words why."""


def write_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    **values: Any,
) -> str:
    """What transformers' `apply_chat_template` writes, tools given as JSON schemas.

    Args:
        values: what else the template may look at.
    Raises:
        TemplateError: it does not take this, or takes too long or too much memory over it.
    """
    variables = {
        **tokenizer.special_tokens_map,
        **values,
        "messages": [_message(it) for it in messages],
        "tools": tools,
        "documents": values.get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    return _PROCESS.write(_template_of(tokenizer, tools), variables)


def _template_of(tokenizer: Any, tools: Sequence[Any] | None) -> str:
    said = tokenizer.chat_template
    if isinstance(said, dict):
        names = ("tool_use", "default") if tools is not None else ("default",)
        said = next((said[name] for name in names if name in said), None)
    if not isinstance(said, str):
        raise TemplateError("it has several, and none of them is the default")
    return said


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: it for name, it in message.items() if it is not None}
    reasoning = next((made[name] for name in _REASONING if name in made), None)
    if reasoning is None:
        return made
    return {"thinking": reasoning, **made, "reasoning_content": reasoning}


class _TemplateProcess:
    """The process, and whose turn it is."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)

    def write(self, template: str, variables: dict[str, Any]) -> str:
        """One text.

        Raises:
            TemplateError: none came of it.
        """
        try:
            request = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, ValueError, RecursionError) as exc:
            raise TemplateError(f"what it is to look at is no JSON ({exc})") from exc
        if len(request) > _MAX_REQUEST_BYTES:
            raise TemplateError(f"{len(request)} bytes are too much for it")
        with self._turn:
            answer = self._ask(request)
        if "text" not in answer:
            raise TemplateError(one_line(str(answer.get("error"))))
        return str(answer["text"])

    def end(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = _start()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        give_up_s = time.monotonic() + _PATIENCE_S
        try:
            stdin.write(len(request).to_bytes(8, "little") + request)
            stdin.flush()
            num_bytes = int.from_bytes(_receive(stdout.fileno(), 8, give_up_s), "little")
            if num_bytes > _MAX_ANSWER_BYTES:
                raise EOFError
            answer: dict[str, Any] = json.loads(_receive(stdout.fileno(), num_bytes, give_up_s))
        except (OSError, EOFError):
            self.end()
            raise TemplateError(
                f"it takes more than {MAX_SECONDS:g} seconds of a core, or too much memory"
            ) from None
        except BaseException:  # half an answer is on its way
            self.end()
            raise
        return answer


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # Not from the file's folder, whose names would hide Python's own.
        [sys.executable, "-P", str(_FILE), str(MAX_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        start_new_session=True,  # ctrl-C is for the manager
    )


def _receive(number: int, num_bytes: int, give_up_s: float) -> bytes:
    """So many bytes of a pipe.

    Raises:
        EOFError: it ends before, or they do not come in time.
    """
    parts: list[bytes] = []
    while num_bytes:
        ready, _, _ = select.select([number], [], [], max(0.0, give_up_s - time.monotonic()))
        part = os.read(number, min(num_bytes, 2**20)) if ready else b""
        if not part:
            raise EOFError
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


_PROCESS: Final = _TemplateProcess()
