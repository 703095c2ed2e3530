"""How a model writes a call of a function, learnt from its own chat template, and read back.

A template is asked to render a call that is made up; what stands around the JSON in it is how this
model begins and ends one. So no format is listed here. Pure but for the template it is handed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from manager.generation import Piece

NAME: Final = "made_up_function"
SPEECH: Final = "made up speech"
KEY, VALUE = "made_up_key", "made_up_value"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One call, as this model writes it: `begin`, a JSON object of two keys, `end`."""

    begin: str
    name_key: str
    arguments_key: str
    end: str
    special: tuple[tuple[int, str], ...] = ()  # tokens of those two that have no text of their own


@dataclass(frozen=True, slots=True)
class Delta:
    """More text, or a whole call."""

    text: str = ""
    call: dict[str, Any] | None = None
    index: int = 0  # of the call


Render = Callable[[list[dict[str, Any]]], str]


def learn_format(render: Render) -> CallFormat | None:
    """The format of calls in a template.

    Args:
        render: messages to text, without what begins an answer.
    Returns:
        None where the template writes no calls, or not as JSON.
    """
    call = {"type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    asked = {"role": "user", "content": "?"}
    try:
        with_call = render(
            [
                asked,
                {"role": "assistant", "content": "", "tool_calls": [{"id": "a1b2c3d4e", **call}]},
            ]
        )
        without = render([asked, {"role": "assistant", "content": SPEECH}])
    except Exception:  # whatever a template raises by itself
        return None
    found = _object_around(with_call, with_call.find(f'"{NAME}"'))
    if found is None:
        return None
    start, end, value = found
    name_key = next((key for key, it in value.items() if it == NAME), None)
    arguments_key = next((key for key, it in value.items() if it == {KEY: VALUE}), None)
    if name_key is None or arguments_key is None:
        return None
    before, _, after = without.partition(SPEECH)  # what begins and ends any answer
    if not with_call.startswith(before):
        return None
    return CallFormat(
        begin=with_call[len(before) : start].lstrip(),
        name_key=name_key,
        arguments_key=arguments_key,
        end=with_call[end:].removesuffix(after).rstrip(),
    )


class CallReader:
    """Reads one text as it comes: what is shown, and the calls in it."""

    def __init__(self, call_format: CallFormat) -> None:
        self._format = call_format
        self._marker = call_format.begin.strip() or "{"
        self._held = ""
        self._in_call = False
        self._num_calls = 0
        self._is_first = True

    def add(self, text: str) -> list[Delta]:
        """More of the text."""
        self._held += text
        deltas: list[Delta] = []
        while (delta := self._next()) is not None:
            deltas.append(delta)
        return deltas

    def shown(self, piece: Piece) -> str:
        """The text of a piece, with what special tokens around a call look like."""
        marks = [name for token, name in self._format.special if token in piece.token_ids]
        return "".join(marks) + piece.text

    def end(self) -> list[Delta]:
        """No text follows: a call that is not whole is text after all."""
        deltas, self._held = ([Delta(text=self._held)] if self._held.strip() else []), ""
        return deltas

    def _next(self) -> Delta | None:
        if not self._in_call:
            return self._text_before_call()
        if "}" not in self._held:
            return None
        start = self._held.find("{")
        found = None if start < 0 else _object_around(self._held, start)
        if found is None:
            return None
        _, end, value = found
        name = value.get(self._format.name_key)
        if not isinstance(name, str):
            return None
        rest = self._held[end:].lstrip()
        marker = self._format.end.strip()
        if marker and len(rest) < len(marker) and marker.startswith(rest):
            return None  # what ends the call is on its way
        self._held = rest.removeprefix(marker).lstrip()
        self._in_call = False
        index, self._num_calls = self._num_calls, self._num_calls + 1
        arguments = value.get(self._format.arguments_key, {})
        call = {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
        return Delta(call=call, index=index)

    def _text_before_call(self) -> Delta | None:
        """Text up to where a call begins, or may begin."""
        held, marker = self._held, self._marker
        if not held.strip() and not self._num_calls and self._is_first:
            return None  # white space ahead of a call is nobody's text
        is_bare = marker == "{"  # then only an answer that begins with it is a call
        at = held.find(marker)
        if at >= 0 and (not is_bare or (self._is_first and not held[:at].strip())):
            self._in_call = True
            self._held = held[at + (0 if is_bare else len(marker)) :]
            return Delta(text=held[:at]) if held[:at].strip() else self._next()
        keep = 0
        if not is_bare:
            keep = next((n for n in range(len(marker) - 1, 0, -1) if held.endswith(marker[:n])), 0)
        text, self._held = held[: len(held) - keep], held[len(held) - keep :]
        if text:
            self._is_first = False
            return Delta(text=text)
        return None


def _object_around(text: str, at: int) -> tuple[int, int, dict[str, Any]] | None:
    """(start, end, value) of the JSON object that begins last before `at`, or there."""
    if at < 0:
        return None
    decoder = json.JSONDecoder()
    start = text.rfind("{", 0, at + 1)
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except ValueError:
            return None
        if isinstance(value, dict) and end > at:
            return start, end, value
        start = text.rfind("{", 0, start)
    return None
