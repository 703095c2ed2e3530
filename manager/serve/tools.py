"""Functions that a request offers to the model: shown to it, forced on it, read back.

Knows the chat template and OpenAI's words. How this model writes a call is learnt from the template
(`manager.serve.tool_calls`); a grammar then sees to it that arguments follow their schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from manager.chat_template import write_chat
from manager.serve.errors import bad_value
from manager.serve.requests import ChatRequest, Tool
from manager.serve.tool_calls import CallFormat, CallReader, learn_format
from manager.text import special_tokens

MAX_TOOLS: Final = 128
ANY: Final[dict[str, Any]] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What becomes of a request's tools."""

    shown: list[dict[str, Any]] | None = None  # to the template
    grammar: str | None = None
    call_format: CallFormat | None = None

    @property
    def reads(self) -> bool:
        """Whether calls are looked for in the text."""
        return self.call_format is not None

    @property
    def marks(self) -> dict[int, str]:
        """Special tokens that begin or end a call, and what they look like to who reads it."""
        return {} if self.call_format is None else dict(self.call_format.special)

    def reader(self) -> CallReader:
        """For one choice."""
        assert self.call_format is not None
        return CallReader(self.call_format)


NO_TOOLS: Final = ToolPlan()


class Tools:
    """Calls of functions, by one model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._format: CallFormat | None = None
        self._is_learnt = False

    def plan(self, request: ChatRequest) -> ToolPlan:
        """What to do with a request's tools and its tool_choice.

        Raises:
            ApiError: the model has no calls, or the choice names none of the tools.
        """
        tools, choice = request.tools or [], request.tool_choice
        if choice is None:
            choice = "auto" if tools else "none"
        if not tools:
            if choice not in ("none", "auto"):
                raise bad_value("tool_choice", "tool_choice wants a call, but there are no tools.")
            return ToolPlan()
        if len(tools) > MAX_TOOLS:
            raise bad_value("tools", f"tools has {len(tools)} entries; at most {MAX_TOOLS} may be.")
        shown = [_shown(tool) for tool in tools]
        if choice == "none":
            return ToolPlan(shown)
        found = self._learnt()
        if found is None:
            raise bad_value(
                "tools",
                "the chat template of this model writes no calls of functions: leave out tools, or "
                "use response_format with a JSON schema.",
            )
        if choice == "auto":
            return ToolPlan(shown, _auto(found, tools), found)
        chosen = _chosen(tools, choice)
        many = bool(request.parallel_tool_calls) and choice == "required"
        return ToolPlan(shown, _forced(found, chosen, many=many), found)

    def _learnt(self) -> CallFormat | None:
        if not self._is_learnt:
            self._is_learnt = True
            if getattr(self._tokenizer, "chat_template", None):
                self._format = learn_format(self._render)
            if self._format is not None:
                self._format = replace(self._format, special=self._special(self._format))
        return self._format

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return write_chat(self._tokenizer, messages)

    def _special(self, found: CallFormat) -> tuple[tuple[int, str], ...]:
        """The special tokens around a call: they have no text of their own when they come."""
        around = (found.begin, found.between or "", found.end)
        return tuple(
            (token, name)
            for token, name in special_tokens(self._tokenizer).items()
            if any(name in text for text in around)
        )


def _shown(tool: Tool) -> dict[str, Any]:
    if tool.type != "function":
        raise bad_value("tools", f"a tool is of type {tool.type[:40]!r}; it must be function.")
    function = {
        name: value
        for name, value in msgspec.structs.asdict(tool.function).items()
        if value is not None and name != "strict"
    }
    return {"type": "function", "function": function}


def _chosen(tools: Sequence[Tool], choice: str | dict[str, Any]) -> list[Tool]:
    """Those that may be called."""
    if choice == "required":
        return list(tools)
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = [tool for tool in tools if tool.function.name == name]
    if not chosen:
        known = ", ".join(tool.function.name for tool in tools)
        raise bad_value(
            "tool_choice",
            f"tool_choice names none of the tools ({known}); it is none, auto, required, or "
            '{"type": "function", "function": {"name": ...}}.',
        )
    return chosen


def _forced(found: CallFormat, tools: Sequence[Tool], *, many: bool) -> str:
    """Nothing but calls."""
    if not many:
        return f"{_HEAD}start: call\n{_call_rules(found, tools)}"
    if found.between is not None:
        return f"{_HEAD}start: calls\n{_call_rules(found, tools)}"
    more = "(SPACE? call)*" if found.begin.strip() else ""
    return f"{_HEAD}start: call {more}\n{_call_rules(found, tools)}"


def _auto(found: CallFormat, tools: Sequence[Tool]) -> str | None:
    """Any text; a call in it follows its function's schema."""
    if found.begin.strip():
        trigger = f"trigger: TEXT {_terms(found.begin.strip(), found)}"
        if not any(name in found.begin for _, name in found.special):
            trigger = trigger.replace("trigger:", "trigger[lazy]:")
        return (
            f"{_HEAD}start: (trigger SPACE? rest)* TEXT\nTEXT: /(.|\\n)*/\n{trigger}\n"
            f"{_call_rules(found, tools)}"
        )
    # Without a marker, an answer that begins as an object does is a call.
    return (
        f"{_HEAD}start: SPACE? call | TEXT\nTEXT: /[^{{ \\n](.|\\n)*/\n{_call_rules(found, tools)}"
    )


def _terms(text: str, found: CallFormat) -> str:
    """A text in the grammar's words; special tokens are no text, but have numbers."""
    if not found.special:
        return json.dumps(text)
    names = "|".join(re.escape(name) for _, name in found.special)
    ids = {name: token for token, name in found.special}
    parts = [part for part in re.split(f"({names})", text) if part]
    return " ".join(f"<[{ids[it]}]>" if it in ids else json.dumps(it) for it in parts)


_HEAD: Final = "%llguidance {}\n"


def _call_rules(found: CallFormat, tools: Sequence[Tool]) -> str:
    begin = f"{_terms(found.begin, found)} " if found.begin else ""
    end = f" {_terms(found.end, found)}" if found.end else ""
    bodies = " | ".join(f"body_{at}" for at in range(len(tools)))
    more = "" if found.between is None else f" ({_terms(found.between, found)} body)*"
    rules = [
        f"call: {begin}body{end}",
        f"calls: {begin}rest",
        f"rest: body{more}{end}",
        f"body: {bodies}",
        "SPACE: /[ \\n]{1,4}/",
    ]
    for at, tool in enumerate(tools):
        schema = {
            "type": "object",
            "properties": {
                found.name_key: {"const": tool.function.name},
                found.arguments_key: tool.function.parameters or ANY,
            },
            "required": [found.name_key, found.arguments_key],
            "additionalProperties": False,
        }
        rules.append(f"body_{at}: %json {json.dumps(schema)}")
    return "\n".join(rules) + "\n"
