"""Turn what people write into token ids: plain prompts, and conversations.

Knows the tokenizer's interface, no model and no worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.foreign_code import foreign
from manager.chat_template import TemplateError, write_chat
from proto.errors import ModelError, RequestRefused, UsageError

Message = Mapping[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to start from, and whether the answer continues their text."""

    token_ids: tuple[int, ...]
    continues_text: bool = False  # then a first word keeps the space in front of it

    @property
    def context(self) -> tuple[int, ...]:
        """What the detokeniser must see ahead of the first token."""
        return self.token_ids if self.continues_text else ()


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model's tokenizer, for prompts."""

    tokenizer: Any  # a transformers one; None where the model came without
    model_name: str

    def encode(self, text: str) -> Prompt:
        """A plain prompt, with the special tokens that the tokenizer puts around text.

        Raises:
            RequestRefused: there is no text, or no token comes of it.
            ModelError: the model came without a tokenizer.
        """
        check_text(text)
        self._check_text_is_understood()
        ids = self._ids(text, add_special_tokens=True)
        if not ids:
            raise RequestRefused(f"the tokenizer makes no token of the prompt {text[:40]!r}.")
        return Prompt(ids, continues_text=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be prompts."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """A conversation in the model's own chat template, up to where the answer begins.

        Args:
            template: what the template may look at beside the messages, as `tools`.
        Raises:
            UsageError: the model has no chat template.
            RequestRefused: there is no message, or the template does not take these.
        """
        self._check_text_is_understood()
        if not self.has_chat_template:
            raise UsageError(
                f"the tokenizer of {self.model_name} has no chat template: "
                "give a plain prompt, without --chat and without messages."
            )
        check_messages(messages)
        try:
            text = write_chat(self.tokenizer, messages, **template, add_generation_prompt=True)
        except TemplateError as exc:
            raise RequestRefused(
                f"the chat template of {self.model_name} does not take this conversation: {exc}"
            ) from exc
        # The template writes the special tokens itself.
        return Prompt(self._ids(text, add_special_tokens=False))

    def _check_text_is_understood(self) -> None:
        if self.tokenizer is None:
            raise ModelError(
                f"{self.model_name} has no tokenizer, so only token ids can be prompts: "
                "put tokenizer.json and tokenizer_config.json beside its config.json"
            )

    def _ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # Prompts may be longer than the tokenizer's own limit; whether one fits is said later,
        # with the numbers.
        with foreign(f"the tokenizer of {self.model_name} does not take this text"):
            encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            return tuple(int(i) for i in encoded["input_ids"])


def id_outside(ids: Sequence[int], vocab_size: int) -> int | None:
    """A token id that a model has not; None if it has all. Quicker than looking at each here."""
    return (
        next((it for it in (min(ids), max(ids)) if not 0 <= it < vocab_size), None) if ids else None
    )


def check_text(text: str) -> None:
    """Raises RequestRefused where a plain prompt has nothing to continue, or half a character."""
    if not text:
        raise RequestRefused("the prompt is empty: write at least one character.")
    _check_characters("the prompt", text)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises RequestRefused where a conversation says nothing, or half a character."""
    if not any(message.get("content") or message.get("tool_calls") for message in messages):
        raise RequestRefused("the conversation is empty: write at least one character.")
    for message in messages:
        for part in message.values():
            if isinstance(part, str):
                _check_characters("the conversation", part)


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:  # a byte of a command line that is no UTF-8
        before = text[max(0, exc.start - 20) : exc.start]
        raise RequestRefused(
            f"{name} has a byte that is no UTF-8 behind {before!r}: write it in UTF-8."
        ) from None
