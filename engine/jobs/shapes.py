"""Recognise by its columns what a row of training data is, and check it.

Pure: rows in, samples out. The first row of a file says which shape all of its rows have. Knows no
tokenizer and no template; `engine.jobs.tokenizing` writes samples as tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

from engine.jobs.rows import Place, Row, shown
from engine.jobs.settings import DataSettings

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Text:
    """Running text: every token is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its continuation, joined as they are; the answer is learnt."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in turn; what the assistant says is learnt, from message `learn_from` on."""

    messages: tuple[Message, ...]
    learn_from: int = 0
    is_instruction: bool = False  # made of an instruction and its answer: needs no chat template


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids as they are; without labels, every token is learnt. -100 is not learnt."""

    ids: tuple[int, ...]
    labels: tuple[int, ...] | None


Sample = Text | Exchange | Conversation | Tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rows of one file are, and how a row becomes a sample.

    `make` raises DataError on a bad value, and gives None for a row with nothing in it.
    """

    name: str
    make: Callable[[Place, Row], Sample | None]
    language_column: str | None = None


# Columns of instructions and of their answers. The first three are the guides' sets hpc-instruct,
# Magicoder-OSS-Instruct, and Evol-Instruct-Code (whose columns are also Alpaca's), as public
# programs that train on these read them.
INSTRUCTION_COLUMNS: Final = (
    ("problem statement", "solution"),
    ("problem", "solution"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
SET_NAMES: Final = {
    ("problem statement", "solution"): "hpc-instruct",
    ("problem", "solution"): "magicoder",
    ("instruction", "output"): "evol-instruct",
}
EXCHANGE_COLUMNS: Final = (("prompt", "completion"), ("prompt", "response"))
MESSAGES_COLUMNS: Final = ("messages", "conversations")
LANGUAGE_COLUMNS: Final = ("language", "lang")
CONTEXT_COLUMN: Final = "input"  # what an instruction is about, beside it

# ShareGPT's way of saying who speaks: `from` is "human", or the name of some model.
_SHARED_ROLES: Final = {"human": "user", "user": "user", "system": "system", "tool": "tool"}


def find_shape(place: Place, columns: Iterable[str], settings: DataSettings) -> Shape:
    """The shape of rows with these columns.

    Raises:
        DataError: the columns are of no known shape, or lack those that the settings name.
    """
    found = list(columns)
    language = next((it for it in LANGUAGE_COLUMNS if it in found), None)
    if settings.text_column is not None:
        _check_column(place, settings.text_column, found, "--text-column")
        return Shape("text", _text_maker(settings.text_column), language)
    if settings.prompt_column is not None and settings.completion_column is not None:
        _check_column(place, settings.prompt_column, found, "--prompt-column")
        _check_column(place, settings.completion_column, found, "--completion-column")
        pair = (settings.prompt_column, settings.completion_column)
        return Shape("prompt+completion", _exchange_maker(*pair), language)
    if "input_ids" in found:
        return Shape("tokens", _tokens_maker(has_labels="labels" in found), language)
    for column in MESSAGES_COLUMNS:
        if column in found:
            return Shape("messages", _messages_maker(column), language)
    for pair in EXCHANGE_COLUMNS:
        if set(pair) <= set(found):
            return Shape("prompt+completion", _exchange_maker(*pair), language)
    for pair in INSTRUCTION_COLUMNS:
        if set(pair) <= set(found):
            name = SET_NAMES.get(pair, "instruction")
            return Shape(name, _instruction_maker(*pair), language)
    if "text" in found:
        return Shape("text", _text_maker("text"), language)
    raise place.bad(_unknown_columns(found))


def _unknown_columns(found: list[str]) -> str:
    return (
        f"the columns {', '.join(map(repr, found)) or '(none)'} are of no known shape: name yours "
        "with --text-column, or with --prompt-column and --completion-column. Known are text; "
        "prompt and completion; messages; instruction and output; 'problem statement' and "
        "solution; input_ids."
    )


def _check_column(place: Place, column: str, found: list[str], option: str) -> None:
    if column not in found:
        near = get_close_matches(column, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(found)}."
        raise place.bad(f"{option} {column!r} is no column of this data: {hint}")


def _text_maker(column: str) -> Callable[[Place, Row], Sample | None]:
    def make(place: Place, row: Row) -> Sample | None:
        text = _string(place, row, column)
        return Text(text) if text.strip() else None

    return make


def _exchange_maker(prompt: str, completion: str) -> Callable[[Place, Row], Sample | None]:
    def make(place: Place, row: Row) -> Sample | None:
        asked, answered = _value(place, row, prompt), _value(place, row, completion)
        if isinstance(asked, list) or isinstance(answered, list):
            before = _messages(place, prompt, _as_messages(asked, "user"))
            after = _messages(place, completion, _as_messages(answered, "assistant"))
            return Conversation((*before, *after), learn_from=len(before))
        text, answer = _string(place, row, prompt), _string(place, row, completion)
        return Exchange(text, answer) if answer.strip() else None

    return make


def _instruction_maker(question: str, answer: str) -> Callable[[Place, Row], Sample | None]:
    def make(place: Place, row: Row) -> Sample | None:
        asked, answered = _string(place, row, question), _string(place, row, answer)
        context = row.get(CONTEXT_COLUMN) if question == "instruction" else None
        if isinstance(context, str) and context.strip():
            asked = f"{asked}\n\n{context}"
        if not asked.strip() or not answered.strip():
            return None
        messages = (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered},
        )
        return Conversation(messages, is_instruction=True)

    return make


def _messages_maker(column: str) -> Callable[[Place, Row], Sample | None]:
    def make(place: Place, row: Row) -> Sample | None:
        said = _value(place, row, column)
        messages = _messages(place, column, said)
        return Conversation(messages) if messages else None

    return make


def _tokens_maker(*, has_labels: bool) -> Callable[[Place, Row], Sample | None]:
    def make(place: Place, row: Row) -> Sample | None:
        ids = _integers(place, row, "input_ids", least=0)
        labels = _integers(place, row, "labels", least=-100) if has_labels else None
        if labels is not None and len(labels) != len(ids):
            raise place.bad(
                f"{len(labels)} labels for {len(ids)} input_ids: each token takes one, -100 where "
                "it is not to be learnt."
            )
        return Tokens(ids, labels) if ids else None

    return make


def _value(place: Place, row: Row, column: str) -> Any:
    try:
        return row[column]
    except KeyError:
        near = get_close_matches(column, [str(it) for it in row], n=1, cutoff=0.8)
        has = ", ".join(map(repr, row)) or "nothing"
        hint = f"is {near[0]!r} meant?" if near else f"the first row has it, this one has {has}."
        raise place.bad(f"there is no {column!r} in it: {hint}") from None


def _string(place: Place, row: Row, column: str) -> str:
    value = _value(place, row, column)
    if not isinstance(value, str):
        raise place.bad(f"{column!r} is {shown(value)}: it takes a text.")
    return value


def _integers(place: Place, row: Row, column: str, *, least: int) -> tuple[int, ...]:
    value = _value(place, row, column)
    if not isinstance(value, (list, tuple)):
        raise place.bad(f"{column!r} is {shown(value)}: it takes a list of token ids.")
    for at, it in enumerate(value):
        if not isinstance(it, int) or isinstance(it, bool) or it < least:
            raise place.bad(f"{column!r} has {shown(it)} at {at}: it takes token ids.")
    return tuple(value)


def _as_messages(said: Any, role: str) -> Any:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _messages(place: Place, column: str, said: Any) -> tuple[Message, ...]:
    if not isinstance(said, (list, tuple)):
        raise place.bad(f"{column!r} is {shown(said)}: it takes a list of messages.")
    return tuple(_message(place, column, number, it) for number, it in enumerate(said, start=1))


def _message(place: Place, column: str, number: int, said: Any) -> Message:
    if not isinstance(said, Mapping):
        raise place.bad(f"message {number} of {column!r} is {shown(said)}: it takes an object.")
    role, content = said.get("role"), said.get("content", said.get("value"))
    if role is None and isinstance(said.get("from"), str):
        role = _SHARED_ROLES.get(said["from"], "assistant")
    if isinstance(content, list):  # parts, as the OpenAI API has them
        parts = [it.get("text") for it in content if isinstance(it, Mapping)]
        texts = [it for it in parts if isinstance(it, str)]
        if len(texts) < len(content):
            raise place.bad(f"message {number} of {column!r} has parts that are no text.")
        content = "".join(texts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise place.bad(
            f"message {number} of {column!r} is {shown(said)}: it takes a role and a content, "
            "both of them texts."
        )
    return {"role": role, "content": content}


def language_of(place: Place, row: Row, column: str) -> str:
    """What a row's language column says; empty where it says nothing."""
    value = _value(place, row, column)
    return value.strip() if isinstance(value, str) else ""
