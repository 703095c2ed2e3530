"""One answer of a llama-server as it comes: events of its stream in, text and counts out.

Pure: the time comes in, in seconds since the request. Knows what llama.cpp's /v1/completions says
with `verbose` and `return_tokens`, nothing of HTTP.

A token that ends inside a character has no event of its own: the next one that completes the
character brings the text, its own id, and a count that has grown by more than one. What the ids
between are can be asked for afterwards (`Answer.gaps`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from manager.generation import Completion, GenerationOptions, Piece, decode_rate
from manager.text import REPLACEMENT, StopFinder

if TYPE_CHECKING:
    from openai.types import Completion as Chunk

VERBOSE: Final = "__verbose"  # llama.cpp's own words, beside those of the OpenAI API
PROGRESS: Final = "prompt_progress"
END_TOKEN: Final = "eos"

OnPiece = Callable[[Piece], None]
OnPrefill = Callable[[int, int], None]  # prompt tokens computed, prompt tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What one event of the stream says."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    num_tokens: int | None = None  # generated until now; None where it does not say
    prompt_tokens: int | None = None
    cached_tokens: int = 0  # of the prompt, with the last event
    prefill: tuple[int, int] | None = None  # prompt tokens computed, prompt tokens
    finish_reason: str | None = None
    by_end_token: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens whose ids did not come: with those of the event, they are this text."""

    at: int  # among the ids that came
    num_missing: int
    text: str
    token_ids: tuple[int, ...]  # of the event: the last ones of the text


def read_event(chunk: Chunk) -> Event:
    """An event from the stream."""
    extra: dict[str, Any] = chunk.model_extra or {}
    said: dict[str, Any] = extra.get(VERBOSE) or {}
    progress = extra.get(PROGRESS)
    if progress is not None:
        return Event(
            prefill=(progress["processed"], progress["total"]), prompt_tokens=progress["total"]
        )
    usage = chunk.usage
    details = None if usage is None else usage.prompt_tokens_details
    text = "".join(choice.text or "" for choice in chunk.choices)
    finish_reason = next((it.finish_reason for it in chunk.choices if it.finish_reason), None)
    return Event(
        text=text,
        token_ids=tuple(said.get("tokens") or ()),
        num_tokens=usage.completion_tokens if usage else said.get("tokens_predicted"),
        prompt_tokens=usage.prompt_tokens if usage else said.get("tokens_evaluated"),
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        finish_reason=finish_reason,
        by_end_token=said.get("stop_type") == END_TOKEN,
    )


class Answer:
    """What one request has so far."""

    def __init__(
        self,
        options: GenerationOptions,
        on_piece: OnPiece | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> None:
        self.options = options
        self._on_piece, self._on_prefill = on_piece, on_prefill
        # The server is not told of stop texts: it would keep to itself what it held back for one
        # that did not come in the end.
        self._finder = StopFinder(options.stop)
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._times_s: list[float] = []
        self._finish_reason: str | None = None
        self.is_stopped = False  # by a stop text: nothing that follows is part of it
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.gaps: list[Gap] = []
        self._rest = ""

    @property
    def is_finished(self) -> bool:
        """Whether the server said that it is, or a stop text did."""
        return self._finish_reason is not None or self.is_stopped

    def take(self, event: Event, now_s: float) -> None:
        """Take the next event; a piece of text goes out."""
        self.prompt_tokens = event.prompt_tokens or self.prompt_tokens
        self.cached_tokens = event.cached_tokens or self.cached_tokens
        if event.prefill is not None:
            if self._on_prefill is not None:
                self._on_prefill(*event.prefill)
            return
        num_new = self._count(event)
        self._times_s += [now_s] * num_new
        if event.text and num_new > len(event.token_ids):
            num_missing = num_new - len(event.token_ids)
            gap = Gap(len(self._token_ids), num_missing, event.text, event.token_ids)
            self.gaps.append(gap)
        self._token_ids += event.token_ids
        text = event.text
        if event.finish_reason and num_new > len(event.token_ids) + event.by_end_token:
            text += REPLACEMENT  # the last character is only half there
        cut = self._finder.add(text)
        self.is_stopped = cut.stopped_by is not None
        self._finish_reason = event.finish_reason or self._finish_reason
        self._give(cut.text, event.token_ids)

    def fill(self, ids: Sequence[tuple[Gap, Sequence[int]]]) -> None:
        """Put in the ids that did not come: all those of the texts of the gaps, as they are."""
        for gap, found in sorted(ids, key=lambda it: it[0].at, reverse=True):
            self._token_ids[gap.at : gap.at + len(gap.token_ids)] = found

    def end(
        self, latency_s: float, *, error: str | None = None, context: int | None = None
    ) -> Completion:
        """The whole. Nothing follows.

        Args:
            error: why it ended early, in a sentence.
            context: of the server; said where it ended the text.
        """
        times = tuple(self._times_s)
        reason = self._finish_reason or "error"
        if error is not None or self.is_stopped:
            reason = "error" if error is not None else "stop"
        is_short = len(times) < self.options.max_new_tokens
        is_full = reason == "length" and is_short and context is not None
        self._rest = self._finder.flush()  # nothing once a stop text was found
        return Completion(
            text="".join([*self._texts, self._rest]),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(times),
            ttft_s=times[0] if times else None,
            decode_tokens_per_s=decode_rate(times),
            latency_s=latency_s,
            error=error,
            detail=f"the server's context of {context} tokens is full" if is_full else "",
            token_times_s=times,
        )

    def give_last_piece(self, completion: Completion) -> None:
        """Send out what no event follows any more, with the finish reason."""
        if self._on_piece is not None:
            self._on_piece(
                Piece(
                    text=self._rest,
                    finish_reason=completion.finish_reason,
                    error=completion.error,
                    detail=completion.detail,
                )
            )

    def _count(self, event: Event) -> int:
        """Tokens that this event adds; one an event where the server does not count them."""
        if event.num_tokens is None:
            return len(event.token_ids) or bool(event.text)
        return max(0, event.num_tokens - len(self._times_s))

    def _give(self, text: str, token_ids: tuple[int, ...]) -> None:
        self._texts.append(text)
        if self._on_piece is not None and (text or token_ids):
            self._on_piece(Piece(text=text, token_ids=token_ids))
