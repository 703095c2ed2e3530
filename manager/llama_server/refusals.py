"""What goes wrong between us and a llama-server, each as one sentence.

Knows the server's own error objects, and the exceptions of the `openai` package by their shape;
imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from manager.generation import Completion
from proto.errors import Error, PeerLost, RequestRefused, UsageError

if TYPE_CHECKING:
    from openai import APIError

CONTEXT_EXCEEDED: Final = "exceed_context_size_error"
TIMED_OUT: Final = "APITimeoutError"
BROKEN_OFF: Final = "RemoteProtocolError"  # of the HTTP library, whichever `openai` uses
CONTEXT_FULL: Final = "Context size has been exceeded"


class ServerLost(PeerLost):
    """The server went away, or says nothing any more."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url = url
        self.args = (f"the llama-server at {url} was lost: {reason}",)


class ServerUnreachable(ServerLost):
    """No request could be sent: its address or its start is to be looked at."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.args = (
            f"no llama-server answers at {url} ({reason}): start one with "
            "`llama-server -m MODEL.gguf --host HOST --port PORT`, or check --server",
        )


class NotLlamaServer(UsageError):
    """Something answers, and it is no llama-server."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"what answers at {url} is no llama-server ({reason}): check --server.")


class ApiKeyRefused(UsageError):
    """The server asks for an API key, or for another one."""

    def __init__(self, url: str, *, has_key: bool) -> None:
        self.url = url
        super().__init__(
            f"the llama-server at {url} does not take this API key: check --api-key-file."
            if has_key
            else f"the llama-server at {url} asks for an API key: pass --api-key-file FILE."
        )


class ContextFull(Error):
    """The server ran out of room for what ran at the same time; alone, each may fit.

    `completion` has what there was until then.
    """

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        super().__init__(completion.error or "")


def refusal_of(exc: APIError) -> RequestRefused:
    """Why the server does not take a request (400)."""
    said = said_by(exc)
    if said.get("type") == CONTEXT_EXCEEDED and "n_ctx" in said:
        return RequestRefused(
            f"the prompt has {said.get('n_prompt_tokens')} tokens, the server's context of "
            f"{said['n_ctx']} leaves room for {int(said['n_ctx']) - 1}: shorten the prompt, or "
            "start llama-server with a larger -c"
        )
    return RequestRefused(f"llama-server refuses the request: {message_of(exc)}")


def said_by(exc: APIError) -> Mapping[str, Any]:
    """The server's error object; empty where it sent none."""
    body: Any = exc.body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    return body if isinstance(body, dict) else {}


def message_of(exc: APIError) -> str:
    """The server's words, in one line."""
    return " ".join(str(said_by(exc).get("message") or exc.message).split()).rstrip(".")


def reason_of(exc: BaseException) -> str:
    """Why a connection failed, as the operating system says it, as far as it can be told."""
    chain = list(_causes(exc))
    for cause in reversed(chain):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[:1].lower() + cause.strerror[1:]
    names = {type(cause).__name__ for cause in chain}
    if TIMED_OUT in names:
        return "no answer in time"
    if BROKEN_OFF in names:
        return "it closed the connection without a whole answer"
    words = str(chain[-1]).strip() or type(chain[-1]).__name__
    return words[:1].lower() + words[1:].rstrip(".")


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        inside = exc.exceptions[0] if isinstance(exc, BaseExceptionGroup) else None
        exc = inside or exc.__cause__ or exc.__context__
