"""OpenAI's messages as chat templates want them: plain texts, and calls with parsed arguments.

Pure. Knows no template and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from manager.serve.errors import bad_value
from manager.serve.requests import ChatMessage, ContentPart

ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
MAX_MESSAGES: Final = 4096


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Each message as a template reads it.

    Raises:
        ApiError: a role that nobody knows, a picture, or a call whose arguments are no JSON.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise bad_value(
            "messages",
            f"messages has {len(messages)} entries; it takes from 1 to {MAX_MESSAGES}.",
        )
    return [_message(message, at) for at, message in enumerate(messages)]


def _message(message: ChatMessage, at: int) -> dict[str, Any]:
    where = f"messages[{at}]"
    if message.role not in ROLES:
        raise bad_value(
            "messages",
            f"{where}.role is {message.role[:40]!r}; it is one of {', '.join(ROLES)}.",
        )
    # What newer clients call developer is what templates call system.
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": _text(message.content, where)}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, where),
                },
            }
            for call in message.tool_calls
        ]
    return made


def _text(content: str | list[ContentPart] | None, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("text", "refusal") or part.text is None:
            raise bad_value(
                "messages",
                f"{where}.content has a part of type {part.type[:40]!r}: this server reads text.",
            )
    return "".join(part.text or "" for part in content)


def _arguments(text: str, where: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError as exc:
        raise bad_value(
            "messages", f"{where}.tool_calls has arguments that are no JSON: {exc}."
        ) from exc
