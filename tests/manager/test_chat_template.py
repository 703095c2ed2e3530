"""Chat templates come from anybody: they write texts, within limits, and do nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import pytest

from manager import chat_template
from manager.chat_template import TemplateError, write_chat
from tests.support.tokenizers import byte_level_tokenizer

MESSAGES: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "Sê breve. 日本 🙂", "name": None},
    {"role": "user", "content": "<b>&amp;</b> 'x' \"y\" \\ {{ 1 }}\n  two"},
    {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [{"id": "1"}]},
]
TOOLS: Final = [{"type": "function", "function": {"name": "f", "parameters": {"é": [1.5, None]}}}]


@pytest.fixture
def tokenizer() -> Any:
    return byte_level_tokenizer(300, chat=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a second of a core for each text."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    chat_template._PROCESS.end()
    yield
    chat_template._PROCESS.end()


# Every way in which templates differ: what they call, and what they look at.
TEMPLATES: Final = [
    "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{{ bos_token }}{{ eos_token }}{{ tools | tojson }}{{ tools | tojson(indent=2) }}",
    "{% for m in messages %}  {%- if m.tool_calls is defined %}T{% endif -%}\n\n{% endfor %}",
    "{% set ns = namespace(a=1, b='') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
    "{% set ns.b = ns.b ~ m.role %}{% endfor %}{{ ns.a }}{{ ns.b }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}"
    "{% break %}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{{ messages[2].thinking }}{{ messages[2].reasoning_content }}{{ messages[2].reasoning }}",
    "{{ messages[0].name is defined }}{{ documents is none }}{{ add_generation_prompt }}",
    "{{ dict(a=1) }}{{ dict.fromkeys('ab') }}{{ strftime_now('%Y') }}{{ wanted }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages|length) }}{{ messages[::-1][0].role }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join }}",
    "   {% if true %}\n  x\n   {% endif %}\n y {# no #} {{- 'z' }}",
    "{{ '%s|%5.2f' % ('a', 1.5) }}{{ '{}'.format(2) }}{{ 'a,b'.split(',') }}{{ 7 // 2 }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_is_the_one_that_transformers_writes(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    settings = {"tools": TOOLS, "add_generation_prompt": True, "wanted": {"a": [1, None]}}
    theirs = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **settings)
    assert write_chat(tokenizer, MESSAGES, **settings) == theirs


def test_of_several_templates_the_one_for_tools_or_the_default_is_taken(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    assert write_chat(tokenizer, MESSAGES) == "plain"
    assert write_chat(tokenizer, MESSAGES, tools=TOOLS) == "with tools"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(TemplateError, match="none of them is the default"):
        write_chat(tokenizer, MESSAGES)


ESCAPES: Final = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}",
    "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os.popen('touch TRACE').read() }}",
    "{{ joiner.__init__.__globals__['__builtins__'].open('TRACE', 'w') }}",
    "{{ lipsum.__globals__.os.system('touch TRACE') }}",
    "{{ lipsum.__globals__['os'].system('touch TRACE') }}",
    "{{ namespace.__init__.__globals__.sys }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.sys }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ (messages | list).__reduce__() }}",
    "{{ range.__self__ }}",
    "{{ (namespace | string).__len__.__self__.__class__ }}",
    "{% set x = (1).__class__ %}{{ x.mro() }}",
    "{{ caller.__globals__ }}",
    "{{ (x for x in []).gi_frame }}",
    "{% for f in [raise_exception] %}{{ f.__code__ }}{% endfor %}",
    "{% import 'os' as os %}{{ os.system('touch TRACE') }}",
    "{% from 'os' import system %}{{ system('touch TRACE') }}",
    "{% include 'TRACE' %}",
    "{% extends '/etc/passwd' %}",
    "{{ open('TRACE', 'w') }}",
    "{{ __import__('os').system('touch TRACE') }}",
    "{{ eval('1') }}",
    "{{ get_flashed_messages.__globals__ }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_no_object_of_python_and_no_file(
    template: str, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = template.replace("TRACE", str(tmp_path / "trace"))
    written = ""
    with suppress(TemplateError):
        written = write_chat(tokenizer, MESSAGES)
    for word in ("<class", "object at", "module", "builtin", "root:", "function"):
        assert word not in written
    assert not (tmp_path / "trace").exists()


WITHOUT_END: Final = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set x = lipsum(n=10**9) %}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% for i in range(99999) %}{% if range(99999) | sum %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 9999999 %}{% for i in range(99999) %}{% set t = s.upper() %}{% endfor %}",
]
TOO_LARGE: Final = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 10**12 }}",
    "{{ (range(99999) | list * 99999) | length }}",
    "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{% set n = namespace(s='aa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{{ ['x' * 9999999] * 999 | join }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("template", WITHOUT_END)
def test_a_template_without_end_is_ended(template: str, tokenizer: Any, impatient: None) -> None:
    """What it used of a core is counted, so a busy machine does no harm."""
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=r"takes more than 0\.5 seconds of a core|too big"):
        write_chat(tokenizer, MESSAGES)
    tokenizer.chat_template = "{{ messages[0].role }}"
    assert write_chat(tokenizer, MESSAGES) == "system"  # by the next process


@pytest.mark.parametrize("template", TOO_LARGE)
def test_a_template_that_would_fill_the_memory_is_refused(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateError) as refused:
        write_chat(tokenizer, MESSAGES)
    assert "\n" not in str(refused.value)
    tokenizer.chat_template = "{{ messages[0].role }}"
    assert write_chat(tokenizer, MESSAGES) == "system"


def test_a_process_that_was_killed_is_started_again(tokenizer: Any) -> None:
    first = write_chat(tokenizer, MESSAGES[:2])
    process = chat_template._PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    assert write_chat(tokenizer, MESSAGES[:2]) == first


def test_the_process_hears_nothing_of_this_ones_secrets(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("COMBOIO_API_KEY", "a secret")
    chat_template._PROCESS.end()
    write_chat(tokenizer, MESSAGES[:2])
    process = chat_template._PROCESS._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ")
    if not environment.exists():
        pytest.skip("needs Linux: /proc")
    assert b"a secret" not in environment.read_bytes()


def test_all_texts_are_written_by_one_process(tokenizer: Any) -> None:
    pids = set()
    for _ in range(20):
        write_chat(tokenizer, MESSAGES[:2])
        process = chat_template._PROCESS._process
        assert process is not None
        pids.add(process.pid)
    assert len(pids) == 1
