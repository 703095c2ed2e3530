"""Calls of functions: their format learnt from a template, and read back however the text comes."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from manager.serve.tool_calls import CallFormat, CallReader, learn_format

MARKED = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
    '{% for c in m.tool_calls %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}</s>\n{% endfor %}"
)
BARE = (
    "{% for m in messages %}[{{ m.role }}] {% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}[end]"
    "{% endfor %}"
)
LISTED = (
    "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]{% elif m.tool_calls %}"
    "[CALLS] [{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
    "c.function.arguments, 'id': c.id} | tojson }}{{ ', ' if not loop.last }}{% endfor %}]</s>"
    "{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
TOLD = CallFormat("<tool_call>\n", "name", "arguments", "\n</tool_call>")
PLAIN = CallFormat("", "name", "parameters", "")
LIST = CallFormat("[CALLS] [", "name", "arguments", "]", ", ")


def render(template: str) -> Any:
    return lambda messages: jinja2.Template(template).render(messages=messages)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, TOLD),
        (BARE, PLAIN),
        (LISTED, CallFormat("[CALLS] [", "name", "arguments", "]", ", ")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m.tool_calls }}{% endfor %}", None),
    ],
)
def test_a_format_is_learnt_from_what_the_template_writes(
    template: str, expected: CallFormat | None
) -> None:
    assert learn_format(render(template)) == expected


def read(call_format: CallFormat, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(call_format)
    deltas = [it for at in range(0, len(text), size) for it in reader.add(text[at : at + size])]
    deltas += reader.end()
    calls = [it.call["function"] for it in deltas if it.call is not None]
    assert [it.index for it in deltas if it.call is not None] == list(range(len(calls)))
    return (
        "".join(it.text for it in deltas),
        [(it["name"], json.loads(it["arguments"])) for it in calls],
    )


ONE = '{"name": "f", "arguments": {"a": 1}}'
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "}{<tool_call>"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("call_format", "text", "expected"),
    [
        (TOLD, "just a < b and {x}", ("just a < b and {x}", [])),
        (TOLD, CALL, ("", [("f", {"a": "}{<tool_call>"})])),
        (TOLD, f"So: {CALL}\n{CALL}", ("So: ", [("f", {"a": "}{<tool_call>"})] * 2)),
        (TOLD, '<tool_call>\n{"name": "f"', ('{"name": "f"', [])),
        (TOLD, CALL.removesuffix("</tool_call>"), ("", [("f", {"a": "}{<tool_call>"})])),
        (LIST, f"[CALLS] [{ONE}, {ONE}] So.", ("So.", [("f", {"a": 1})] * 2)),
        (LIST, f"[CALLS] [{ONE}, {ONE}", ("", [("f", {"a": 1})] * 2)),
        (LIST, f"see [1]: [CALLS] [{ONE}]", ("see [1]: ", [("f", {"a": 1})])),
        (PLAIN, '{"name": "g", "parameters": {}}', ("", [("g", {})])),
        (PLAIN, 'It is {"name": "g"}', ('It is {"name": "g"}', [])),
        (PLAIN, "", ("", [])),
    ],
)
def test_calls_are_found_wherever_pieces_end(
    call_format: CallFormat, text: str, expected: Any, size: int
) -> None:
    said, calls = read(call_format, text, size)
    assert (said.strip(), calls) == (expected[0].strip(), expected[1])
