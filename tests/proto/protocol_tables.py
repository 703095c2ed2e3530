"""Write the tables of docs/protocol.md out of the code: run this file after a change of either.

    .venv/bin/python tests/proto/protocol_tables.py

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; a test compares.
"""

from __future__ import annotations

import re
import sys
from inspect import getsource
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from proto import messages  # noqa: E402
from proto.messages import (  # noqa: E402
    MESSAGES,
    AdapterFacts,
    Drawn,
    Fault,
    Message,
    Role,
    Run,
    Sampling,
    Scored,
    Scoring,
    WorkerFacts,
)
from proto.session import CONVERSATION, LISTENER, OPENER, TRANSITIONS, State  # noqa: E402

DOCUMENT = ROOT / "docs" / "protocol.md"
PARTS = (
    WorkerFacts,
    Run,
    Sampling,
    Scoring,
    Fault,
    Drawn,
    Scored,
    AdapterFacts,
)  # structs that only occur inside messages


def renew(text: str) -> str:
    """The document with every table made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        assert text.count(begin) == text.count(end) == 1, f"{DOCUMENT} needs one {begin}"
        inside = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        lines = "\n".join([begin, *table(), end])
        text = inside.sub(lambda _, lines=lines: lines, text)
    return text


def message_table() -> list[str]:
    rows = ["| type | message | says | payload |", "| --- | --- | --- | --- |"]
    for tag, kind in sorted(MESSAGES.items()):
        payload = "yes" if kind.HAS_PAYLOAD else ""
        rows.append(f"| {tag} | `{kind.__name__}` | {first_sentence(kind)} | {payload} |")
    return rows


def field_tables() -> list[str]:
    lines = []
    for struct in (*(MESSAGES[tag] for tag in sorted(MESSAGES)), *PARTS):
        title = f"`{struct.__name__}`"
        if issubclass(struct, Message):
            title += f" (type {struct.TAG})"
        lines += [f"**{title}**", ""]
        info = inspect.type_info(struct)
        assert isinstance(info, inspect.StructType)
        if not info.fields:
            lines += ["No fields: an empty array.", ""]
            continue
        meanings = comments_of(struct)
        lines += ["| # | field | type | default | |", "| --- | --- | --- | --- | --- |"]
        for number, field in enumerate(info.fields):
            default = "" if field.required else f"`{default_of(field)}`"
            cells = (f"`{field.name}`", type_text(field.type), default, meanings[field.name])
            lines.append(f"| {number} | {' | '.join(cells)} |")
        lines.append("")
    return lines[:-1]


def transition_table() -> list[str]:
    rows = ["| link is | who | says | link becomes |", "| --- | --- | --- | --- |"]
    for (state, side, kind), after in TRANSITIONS.items():
        rows.append(f"| {state.value} | {side.value} | `{kind.__name__}` | {after.value} |")
    return rows


def state_diagram() -> list[str]:
    """The same without refusals, which lead from every state before `open` to `closed`."""
    lines = [
        "```mermaid",
        "stateDiagram-v2",
        f"    [*] --> {State.UNPROVEN.value}: with a secret",
        f"    [*] --> {State.UNGREETED.value}: without one",
    ]
    for (state, side, kind), after in TRANSITIONS.items():
        if kind.__name__ != "Refused":
            lines.append(f"    {state.value} --> {after.value}: {side.value} {kind.__name__}")
    return [*lines, f"    {State.CLOSED.value} --> [*]", "```"]


def conversation_table() -> list[str]:
    rows = ["| role of the opener | opener may say | listener may say |", "| --- | --- | --- |"]
    for role in Role:
        said = [
            ", ".join(
                f"`{kind.__name__}`"
                for kind in sorted(CONVERSATION[role, side], key=lambda kind: kind.TAG)
            )
            for side in (OPENER, LISTENER)
        ]
        rows.append(f"| {role.value} | {said[0]} | {said[1]} |")
    return rows


TABLES = {
    "messages": message_table,
    "fields": field_tables,
    "transitions": transition_table,
    "diagram": state_diagram,
    "conversation": conversation_table,
}


def first_sentence(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def comments_of(struct: type) -> dict[str, str]:
    """What the source says behind each field."""
    lines = getsource(struct).splitlines()
    found = (re.match(r"    (\w+): .*?(?:  # (.*))?$", line) for line in lines)
    return {match[1]: match[2] or "" for match in found if match}


def default_of(field: inspect.Field) -> str:
    """As JSON writes it, which is how people read msgpack."""
    if field.default is not msgspec.NODEFAULT:
        return msgspec.json.encode(field.default).decode()
    assert field.default_factory is not msgspec.NODEFAULT
    return msgspec.json.encode(field.default_factory()).decode()


def type_text(kind: Any) -> str:
    match kind:
        case inspect.UnionType(types=types):
            return " or ".join(type_text(one) for one in types)
        case inspect.NoneType():
            return "null"
        case inspect.BoolType():
            return "bool"
        case inspect.IntType(ge=low, le=high):
            return f"int, {number(low)} to {number(high)}"
        case inspect.FloatType(ge=low, gt=above, le=high):
            if low is None and above is None:
                return "float"
            least = f"{low:g}" if low is not None else f"above {above:g}"
            return f"float, {least} to {high:g}"
        case inspect.StrType(min_length=shortest, max_length=longest):
            least = f"{shortest} to" if shortest else "up to"
            return f"str, {least} {longest} characters"
        case inspect.BytesType(max_length=length):
            return f"bin, {length} bytes"
        case inspect.EnumType(cls=cls):
            return "one of " + ", ".join(f'"{member.value}"' for member in cls)
        case inspect.ListType(item_type=item, min_length=shortest, max_length=longest):
            return f"array of {shortest or 0} to {longest}: {type_text(item)}"
        case inspect.TupleType(item_types=items):
            return "(" + "; ".join(map(type_text, items)) + ")"
        case inspect.StructType(cls=cls):
            return f"`{cls.__name__}`"
    raise AssertionError(f"no text for {kind}")


def number(value: int) -> str:
    powers = {2**31 - 1: "2^31-1", 2**53: "2^53", 2**63 - 1: "2^63-1"}
    return powers.get(value, str(value))


if __name__ == "__main__":
    DOCUMENT.write_text(renew(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT}: tables of protocol version {messages.PROTOCOL_VERSION}\n")
