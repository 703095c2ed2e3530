"""What clients read: OpenAI's objects, whole or as the events of a stream.

Pieces in, bytes out. A stream's events are put together from parts that are made once a
request, since one goes out for every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from manager.generation import Piece, TokenLogprob
from manager.serve.tool_calls import CallReader, Delta

encode: Final = msgspec.json.Encoder().encode
DONE: Final = b"data: [DONE]\n\n"

TokenBytes = Callable[[int], bytes]


@dataclass(slots=True)
class Choice:
    """What one sequence has yielded until now."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """One more piece."""
        self.texts.append(piece.text)
        self.logprobs += piece.logprobs
        self.num_tokens += len(piece.token_ids)
        self.finish_reason = piece.finish_reason or self.finish_reason

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


def event(value: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + encode(value) + b"\n\n"


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """What was read and written."""
    completion_tokens = sum(choice.num_tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answer:
    """The answer to one request; the two kinds below differ in their words."""

    kind = ""
    chunk_kind = ""
    prefix = ""
    num_echoed = 0  # numbers about the prompts in it: with many, it takes a while to put together

    def __init__(
        self,
        request_id: str,
        model: str,
        num_choices: int,
        prompt_tokens: int,
        *,
        include_usage: bool = False,
        num_top: int | None = None,
        token_bytes: TokenBytes | None = None,
    ) -> None:
        """
        Args:
            num_top: alternatives wanted with every token; None: no log-probabilities.
            token_bytes: what a token stands for, where log-probabilities are wanted.
        """
        self.choices = [Choice() for _ in range(num_choices)]
        self.prompt_tokens = prompt_tokens
        self.created = int(time.time())
        self.id = f"{self.prefix}-{request_id}"
        self.model = model
        self._include_usage = include_usage
        self._num_top, self._token_bytes = num_top, token_bytes
        self._texts: dict[int, tuple[str, bytes]] = {}  # of tokens that were asked for
        # With usage asked for, every event before the last says that it is not there yet.
        tail = {"usage": None} if include_usage else {}
        self._tail = encode(tail)[1:-1]
        self._head = b"data: " + encode(self._frame(self.chunk_kind))[:-1] + b',"choices":['

    # --- a stream ----------------------------------------------------------------------------

    def opening(self) -> bytes:
        """Before the first piece."""
        return b""

    def events(self, index: int, piece: Piece) -> bytes:
        """What a piece becomes; remembered as well."""
        raise NotImplementedError

    def closing(self) -> bytes:
        """Behind the last piece."""
        if not self._include_usage:
            return DONE
        last = self._frame(self.chunk_kind)
        last |= {"choices": [], "usage": usage(self.prompt_tokens, self.choices)}
        return event(last) + DONE

    def _event(self, choice: bytes) -> bytes:
        tail = b"]," + self._tail if self._tail else b"]"
        return self._head + choice + tail + b"}\n\n"

    # --- at once -----------------------------------------------------------------------------

    def add(self, index: int, piece: Piece) -> None:
        """Remember a piece."""
        self.choices[index].add(piece)

    def whole(self) -> bytes:
        """All of it."""
        made = self._frame(self.kind)
        chosen = [(at, self.choices[at]) for at in self._answered()]
        made["choices"] = [self._choice(*it) | {"index": index} for index, it in enumerate(chosen)]
        made["usage"] = usage(self.prompt_tokens, self.choices)
        return encode(made)

    def _answered(self) -> Iterable[int]:
        """The choices that the client gets, in this order."""
        return range(len(self.choices))

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        raise NotImplementedError

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _token(self, token: int) -> tuple[str, bytes]:
        known = self._texts.get(token)
        if known is None:
            assert self._token_bytes is not None
            raw = self._token_bytes(token)
            known = self._texts[token] = raw.decode("utf-8", "replace"), raw
        return known


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, *args: Any, readers: Sequence[CallReader] = (), **values: Any) -> None:
        """`readers`: one a choice, where the model may ask for functions."""
        super().__init__(*args, **values)
        self._readers = list(readers)

    def opening(self) -> bytes:
        return b"".join(
            self._event(self._part(at, b'{"role":"assistant","content":""}', None, b"null"))
            for at in range(len(self.choices))
        )

    def events(self, index: int, piece: Piece) -> bytes:
        deltas = self._take(index, piece)
        logprobs = b"null"
        if self._num_top is not None and piece.logprobs:
            logprobs = encode(self._logprobs(piece.logprobs))
            deltas = deltas or [Delta(text="")]
        events = [
            self._event(self._part(index, _delta(it), None, logprobs if not at else b"null"))
            for at, it in enumerate(deltas)
        ]
        if piece.finish_reason is not None:
            reason = self._finish_reason(self.choices[index])
            events.append(self._event(self._part(index, b"{}", reason, b"null")))
        return b"".join(events)

    def add(self, index: int, piece: Piece) -> None:
        self._take(index, piece)

    def _take(self, index: int, piece: Piece) -> list[Delta]:
        """The piece as texts and calls."""
        choice = self.choices[index]
        if not self._readers:
            choice.add(piece)
            return [Delta(text=piece.text)] if piece.text else []
        reader = self._readers[index]
        deltas = reader.add(piece.text)
        if piece.finish_reason is not None:
            deltas += reader.end()
        choice.add(piece)
        choice.texts[-1:] = [it.text for it in deltas if it.text]
        choice.calls += [it.call for it in deltas if it.call is not None]
        return deltas

    def _part(self, index: int, delta: bytes, finish_reason: str | None, logprobs: bytes) -> bytes:
        return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            delta,
            logprobs,
            encode(finish_reason),
        )

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": None if self._num_top is None else self._logprobs(choice.logprobs),
            "finish_reason": self._finish_reason(choice),
        }

    def _finish_reason(self, choice: Choice) -> str | None:
        return "tool_calls" if choice.calls else choice.finish_reason

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text, raw = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": list(raw)}

        return {
            "content": [
                entry(it.token_id, it.logprob)
                | {"top_logprobs": [entry(*one) for one in it.top[: self._num_top]]}
                for it in logprobs
            ],
            "refusal": None,
        }


def _delta(delta: Delta) -> bytes:
    if delta.call is None:
        return b'{"content":%b}' % encode(delta.text)
    return encode({"tool_calls": [{"index": delta.index, **delta.call}]})
