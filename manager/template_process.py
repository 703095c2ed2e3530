"""Write conversations as chat templates say, in a process that is good for nothing else.

A template comes with a checkpoint, from anybody. Jinja's sandbox keeps it from Python's objects,
but not from a loop without end, nor from a text that fills the memory. So it runs here: each text
has so many seconds of a core, and the process so much memory, beyond which the system ends it. It
can write no file. Started as a file by `manager.chat_template`, which starts another when it was
ended; imports nothing of ours.

Requests come on stdin and answers go to stdout: 8 bytes of length, then JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_MEMORY_BYTES: Final = 512 * 2**20  # beside what the process takes by itself
_MAX_CHARS: Final = 16 * 2**20  # of one text
_MAX_REQUEST_BYTES: Final = 64 * 2**20


def main(max_seconds: float) -> None:
    """Answer requests until there are no more.

    Args:
        max_seconds: of one core, for one text.
    """
    _limit()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, max_seconds)  # then SIGPROF, which ends the process
        answer = json.dumps(_answer(request)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(len(answer).to_bytes(8, "little") + answer)
        answers.flush()


def _answer(request: bytes) -> dict[str, str]:
    """What is said to one request."""
    try:
        said = json.loads(request)
        text: list[str] = []
        num_chars = 0
        for part in _compiled(said["template"]).generate(said["variables"]):
            num_chars += len(part)
            if num_chars > _MAX_CHARS:
                return {"error": f"it writes more than {_MAX_CHARS} characters"}
            text.append(part)
    except MemoryError:
        return {"error": f"it takes more than {_MAX_MEMORY_BYTES} bytes of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as exc:  # jinja's errors, and whatever a template raises by itself
        return {"error": f"{exc}"[:1000] or type(exc).__name__}
    return {"text": "".join(text)}


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(8)
    num_bytes = int.from_bytes(head, "little")
    if len(head) < 8 or num_bytes > _MAX_REQUEST_BYTES:
        return None
    return stream.read(num_bytes)


def _limit() -> None:
    """Tell the system what this process may take."""
    for kind, most in (
        (resource.RLIMIT_AS, _own_bytes() + _MAX_MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # a system that limits no such thing, or more already
            continue


def _own_bytes() -> int:
    """Address space that is taken already."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return 512 * 2**20


# --- the language of chat templates --------------------------------------------------------------
#
# What transformers offers them (transformers.utils.chat_template_utils), whose import would take
# this process seconds and hundreds of megabytes. A test compares what both write.


@lru_cache(8)
def _compiled(template: str) -> jinja2.Template:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made.from_string(template)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, which is of no interest here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without what a class has."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that keeps out of Python's own names."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        made = dict(*given, **values)
        for name in made:
            _check_name(name)
        Namespace.__init__(self, made)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    main(float(sys.argv[1]))
