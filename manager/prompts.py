"""Read a file of prompts, and check all of it before anything runs.

Two kinds: `.txt`, a prompt a line, and `.jsonl`, an object a line with `prompt` or `messages`.
Knows the file's format and the options that a row may set; no model, no tokenizer, no worker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from manager.encoding import Message
from manager.generation import GenerationOptions
from proto.errors import RequestRefused, UsageError

SUFFIXES: Final = (".txt", ".jsonl")
OWN_KEYS: Final = ("id", "prompt", "messages")
OPTION_KEYS: Final = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "adapter",
)
# What other programs call the same thing. Data sets bring keys of their own, which are left
# alone, but one that was meant to change the text must not be passed over in silence.
OTHER_NAMES: Final = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "text": "prompt",
    "conversation": "messages",
}
TYPO_LIKENESS: Final = 0.9  # of two keys, as difflib measures it: one letter wrong in ten
SHOWN_CHARS: Final = 60  # of a value, in a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt, what it is called, and how it is generated. Either `prompt` or `messages`."""

    index: int  # its place among the prompts, from 0
    line: int  # its line in the file, from 1
    id: str | int | None
    prompt: str | None
    messages: tuple[Message, ...] | None
    options: GenerationOptions

    @property
    def key(self) -> str:
        """A digest of everything that its text depends on, beside the model."""
        options = {name: getattr(self.options, name) for name in OPTION_KEYS}
        if options["adapter"] is None:  # as rows were before there were adapters
            del options["adapter"]
        content = {"prompt": self.prompt, "messages": self.messages, "options": options}
        canonical = json.dumps(content, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """How a plain prompt becomes a conversation (`--chat`, `--system`)."""

    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise UsageError("--system belongs to a conversation: pass --chat as well.")

    def apply(self, prompt: str) -> tuple[str | None, tuple[Message, ...] | None]:
        """(prompt, messages) of a row whose file says `prompt`; one of them is None."""
        if not self.chat:
            return prompt, None
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return None, (*system, {"role": "user", "content": prompt})


PLAIN: Final = Template()


def read_prompts(path: Path, options: GenerationOptions, template: Template = PLAIN) -> list[Row]:
    """All rows of a file.

    Args:
        options: of rows that do not say otherwise.
        template: for plain prompts; a row with `messages` is a conversation anyway.
    Raises:
        UsageError: the file is not there, is of no known kind, has no prompt, or has a bad line;
            names the file and the line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--prompts {path}: its name must end in .txt (a prompt a line) or .jsonl "
            "(an object with prompt or messages a line)."
        )
    read = _text_row if path.suffix.lower() == ".txt" else _json_row
    rows = [
        read(_Place(path, line), text, index, options, template)
        for index, (line, text) in enumerate(_lines(path))
    ]
    if not rows:
        raise UsageError(f"--prompts {path} has no prompt in it: write one a line.")
    return rows


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a line stands, for sentences."""

    path: Path
    line: int

    def bad(self, what: str) -> UsageError:
        """What is wrong there."""
        return UsageError(f"{self.path}:{self.line}: {what}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not blank. Lines end at LF or CR LF, nowhere else."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"--prompts {path}: there is no such file.") from None
    except IsADirectoryError:
        raise UsageError(f"--prompts {path} is a folder: name a file of prompts.") from None
    except OSError as exc:
        raise UsageError(f"--prompts {path} cannot be read: {exc.strerror}.") from exc
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = raw.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as exc:
            raise _Place(path, number).bad(
                f"byte {exc.start + 1} of the line ({raw[exc.start]:#04x}) is not UTF-8: "
                "save the file as UTF-8."
            ) from None
        if text.strip():
            yield number, text


def _text_row(
    place: _Place, text: str, index: int, options: GenerationOptions, template: Template
) -> Row:
    prompt, messages = template.apply(text)
    return Row(
        index=index, line=place.line, id=None, prompt=prompt, messages=messages, options=options
    )


def _json_row(
    place: _Place, text: str, index: int, options: GenerationOptions, template: Template
) -> Row:
    values = _object(place, text)
    _check_keys(place, values)
    prompt, messages = _prompt_or_messages(place, values, template)
    return Row(
        index=index,
        line=place.line,
        id=_id(place, values.get("id")),
        prompt=prompt,
        messages=messages,
        options=_options(place, values, options),
    )


def _object(place: _Place, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as exc:
        raise place.bad(f"not JSON: {exc.msg} at column {exc.colno}.") from None
    except (RecursionError, ValueError):  # nested without end; a number of thousands of digits
        raise place.bad(
            "not JSON that can be read: it is nested too deep, or has too long a number."
        ) from None
    if not isinstance(values, dict):
        raise place.bad(
            f'{_shown(values)} is no object: write for example {{"prompt": "Once upon a time"}}.'
        )
    return values


def _check_keys(place: _Place, values: Mapping[str, Any]) -> None:
    known = (*OWN_KEYS, *OPTION_KEYS)
    has_text = "prompt" in values or "messages" in values
    for key in values:
        meant = OTHER_NAMES.get(key)
        if meant in OWN_KEYS and has_text:
            meant = None  # a data set's own column
        near = get_close_matches(key.replace("-", "_"), known, n=1, cutoff=TYPO_LIKENESS)
        if key not in known and (meant or near):
            raise place.bad(f"unknown key {key!r}: write {meant or near[0]!r}.")


def _prompt_or_messages(
    place: _Place, values: Mapping[str, Any], template: Template
) -> tuple[str | None, tuple[Message, ...] | None]:
    if ("prompt" in values) == ("messages" in values):
        found = "both" if "prompt" in values else "neither"
        raise place.bad(f"a row needs either 'prompt' or 'messages', this one has {found}.")
    if "prompt" in values:
        return template.apply(_text(place, "prompt", values["prompt"]))
    messages = values["messages"]
    if not isinstance(messages, list) or not messages:
        raise place.bad(f"messages is {_shown(messages)}; it takes a list of at least one message.")
    return None, tuple(_message(place, message) for message in messages)


def _message(place: _Place, message: object) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise place.bad(
            f'{_shown(message)} is no message: write {{"role": "user", "content": "..."}}.'
        )
    return {name: _text(place, f"{name} of a message", value) for name, value in message.items()}


def _options(
    place: _Place, values: Mapping[str, Any], options: GenerationOptions
) -> GenerationOptions:
    own = {name: values[name] for name in OPTION_KEYS if values.get(name) is not None}
    if "stop" in own:
        stop = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
        if not isinstance(stop, list):
            raise place.bad(f"stop is {_shown(stop)}; it takes a text or a list of texts.")
        own["stop"] = tuple(_text(place, "a stop text", text) for text in stop)
    if values.get("adapter") == "":  # the model alone, whatever the other rows use
        own["adapter"] = None
    try:
        return replace(options, **own)
    except RequestRefused as exc:
        raise place.bad(str(exc)) from None


def _id(place: _Place, value: object) -> str | int | None:
    if isinstance(value, str):
        return _text(place, "id", value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise place.bad(f"id is {_shown(value)}; it takes a text or a whole number.")


def _text(place: _Place, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise place.bad(f"{name} is {_shown(value)}; it takes a text.")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        half = value[exc.start]
        raise place.bad(f"{name} has half a character, {half!a}; write the whole one.") from None
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
