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

NAME: Final = "made_up_function"
OTHER: Final = "another_one"
SPEECH: Final = "made up speech"
KEY, VALUE = "made_up_key", "made_up_value"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One call, as this model writes it: `begin`, a JSON object of two keys, `end`."""

    begin: str
    name_key: str
    arguments_key: str
    end: str
    between: str | None = None  # two calls of a list, which begins and ends once; None: no lists
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
    asked = {"role": "user", "content": "?"}
    try:
        with_call = render([asked, _calling(NAME)])
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
    found_end = with_call[end:].removesuffix(after).rstrip()
    return CallFormat(
        begin=with_call[len(before) : start].lstrip(),
        name_key=name_key,
        arguments_key=arguments_key,
        end=found_end,
        between=_between(render, asked, found_end),
    )


def _calling(*names: str) -> dict[str, Any]:
    """A turn that asks for these functions."""
    calls = [
        {
            "id": f"a1b2c3d{at:02}",  # nine signs, as some templates insist
            "type": "function",
            "function": {"name": name, "arguments": {KEY: VALUE}},
        }
        for at, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _between(render: Render, asked: dict[str, Any], end: str) -> str | None:
    """What stands between two calls, where it does not end one and begin another."""
    try:
        text = render([asked, _calling(NAME, OTHER)])
    except Exception:  # one at a time, says the template
        return None
    first = _object_around(text, text.find(f'"{NAME}"'))
    second = _object_around(text, text.find(f'"{OTHER}"'))
    if first is None or second is None or not first[1] <= second[0]:
        return None
    between = text[first[1] : second[0]]
    return between if between.strip() and not (end and between.startswith(end)) else None


class CallReader:
    """Reads one text as it comes: what is shown, and the calls in it."""

    def __init__(self, call_format: CallFormat) -> None:
        self._format = call_format
        self._marker = call_format.begin.strip() or "{"
        self._held = ""
        self._in_call = False
        self._num_calls = 0
        self._is_first = True
        self._is_last = False

    def add(self, text: str) -> list[Delta]:
        """More of the text."""
        self._held += text
        deltas: list[Delta] = []
        while (delta := self._next()) is not None:
            deltas.append(delta)
        return deltas

    def end(self) -> list[Delta]:
        """No text follows: a call that is not whole is text after all.

        One that only lacks what ends it is whole: that may be the very token that ends the text.
        """
        deltas = []
        if self._in_call:
            self._is_last = True
            deltas = self.add("")
        if self._held.strip():
            deltas.append(Delta(text=self._held))
        self._held = ""
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
        marks = [it.strip() for it in (self._format.end, self._format.between or "") if it.strip()]
        ends = next((it for it in marks if rest.startswith(it)), "")
        if not ends and not self._is_last and any(it.startswith(rest) for it in marks):
            return None  # what ends the call is on its way
        self._held = rest.removeprefix(ends).lstrip()
        self._in_call = bool(ends) and ends == (self._format.between or "").strip()
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
