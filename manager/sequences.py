"""One request on its way: what it asked for, what it has so far, and who waits for it.

Knows neither scheduler nor link: the pipeline tells it which tokens are its own and how it ended.
The time comes in, in seconds of one monotonic clock.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from manager.encoding import Prompt
from manager.generation import (
    Completion,
    GenerationOptions,
    Piece,
    PromptLogprobs,
    TokenLogprob,
    decode_rate,
)
from manager.pace import AT_ONCE, Pace
from manager.text import NOTHING_SHOWN, Cut, TextStream, Vocabulary
from proto.messages import Drawn, Sampling


class Constraint(Protocol):
    """What limits the tokens of one sequence: a grammar, and how far the text is within it."""

    num_mask_words: int  # of every mask

    def token_came(self, token: int) -> None:
        """This token is part of the text now. Quick: called on the event loop."""

    def mask(self) -> bytes:
        """Which tokens may follow, a bit each; none where the grammar cannot tell any more.

        Takes its time: called on a thread. Raises nothing.
        """


class ActiveSequence:
    """The state of one request between its submission and its last piece."""

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        options: GenerationOptions,
        vocabulary: Vocabulary,
        now_s: float,
        adapter: int | None = None,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] = NOTHING_SHOWN,
        pace: Pace = AT_ONCE,
    ) -> None:
        """
        Args:
            shown: special tokens that have a text in this one, and that text.
            pace: how often whoever reads it is woken.
        """
        self.adapter = adapter  # its number in this lease; None: the model alone
        self.number, self.prompt, self.options = number, prompt, options
        self.seed = secrets.randbits(63) if options.seed is None else options.seed
        self.on_prefill: Callable[[int, int], None] | None = None  # tokens done, tokens in all
        self._text = TextStream(vocabulary, options.stop, prompt.context, shown)
        self._seen = dict.fromkeys(prompt.token_ids) if options.looks_back else {}
        self._generated = Counter[int]()  # where a draw depends on it
        self.constraint = constraint
        self._submitted_s = now_s
        self._token_times_s: list[float] = []
        self._record = _Record()
        # What nobody has fetched yet. It holds at most what the request may generate: a slow
        # reader gets fewer, longer pieces.
        self._unread = _Record()
        self._wake, self._pace = asyncio.Event(), pace
        self._piece_s = -math.inf  # when the last piece was due
        self._scores: list[bytes] = []  # of the prompt's tokens, as they come
        self._num_scored = 0
        self._give_scores_if_whole()

    # --- what the pipeline tells it ----------------------------------------------------------

    def sampling(self, draw: int, num_offsets: int = 0) -> Sampling:
        """How the token number `draw` is drawn."""
        return self.options.sampling(
            seed=self.seed,
            draw=draw,
            num_history=len(self._seen),
            num_offsets=num_offsets,
            num_mask_words=0 if self.constraint is None else self.constraint.num_mask_words,
        )

    @property
    def offsets(self) -> list[tuple[int, float]]:
        """(token, what is added to its logit): the biases, less the penalties of what came."""
        options = self.options
        if not self._generated:
            return list(options.logit_bias)
        added = dict(options.logit_bias)
        for token, times in self._generated.items():
            penalty = options.presence_penalty + times * options.frequency_penalty
            added[token] = added.get(token, 0.0) - penalty
        return list(added.items())

    @property
    def history(self) -> Sequence[int]:
        """Distinct token ids seen so far, where a draw depends on them."""
        return list(self._seen)

    def scores_came(self, num_tokens: int, rows: bytes) -> None:
        """Take how likely the prompt's next tokens are; they come in order, each once."""
        self._scores.append(rows)
        self._num_scored += num_tokens
        self._give_scores_if_whole()

    def token_came(self, token: int, drawn: Drawn | None, now_s: float) -> bool:
        """Take the next token of the text; True when a stop text is complete with it."""
        self._add_token(token, drawn, now_s)
        if self.constraint is not None:
            self.constraint.token_came(token)
        cut = self._text.add(token)
        self._add_text(cut)
        return cut.stopped_by is not None

    def end_token_came(self, token: int, drawn: Drawn | None, now_s: float) -> None:
        """Take the token that says the text is over. It is counted and has no text."""
        self._add_token(token, drawn, now_s)

    def finish(
        self, reason: str, error: str | None = None, detail: str = "", *, now_s: float
    ) -> None:
        """No token follows. A stop text among the last characters still counts."""
        if self.is_finished:
            return
        if not self._record.stopped:
            cut = self._text.flush()
            self._add_text(cut)
            if cut.stopped_by is not None and reason == "length":
                reason = "stop"
        for record in (self._record, self._unread):
            record.finish_reason, record.finished_s = reason, now_s
            record.error, record.detail = error, detail
        self._wake.set()

    @property
    def is_finished(self) -> bool:
        """Whether the last piece is there."""
        return self._record.finish_reason is not None

    # --- what the reader gets ----------------------------------------------------------------

    async def pieces(self) -> AsyncIterator[Piece]:
        """Everything that comes, in order; the last piece has a finish reason."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._unread.is_empty:
                continue  # woken for what it has read already
            unread, self._unread = self._unread, _Record()
            yield unread.as_piece()
            if unread.finish_reason is not None:
                return

    def completion(self) -> Completion:
        """The whole, once it is finished."""
        record, times = self._record, self._token_times_s
        assert record.finish_reason is not None
        return Completion(
            text="".join(record.texts),
            token_ids=tuple(record.token_ids),
            finish_reason=record.finish_reason,
            prompt_tokens=len(self.prompt.token_ids),
            completion_tokens=len(record.token_ids),
            ttft_s=times[0] if times else None,
            decode_tokens_per_s=decode_rate(times),
            latency_s=record.finished_s - self._submitted_s,
            error=record.error,
            detail=record.detail,
            logprobs=tuple(record.logprobs),
            prompt_logprobs=record.prompt_logprobs,
            token_times_s=tuple(times),
        )

    # --- inside ------------------------------------------------------------------------------

    def _give_scores_if_whole(self) -> None:
        num_top, tokens = self.options.prompt_logprobs, self.prompt.token_ids
        if num_top is None or self._num_scored + 1 < len(tokens):
            return
        whole = PromptLogprobs(tokens, num_top, b"".join(self._scores))
        self._record.prompt_logprobs = self._unread.prompt_logprobs = whole
        self._wake.set()

    def _add_token(self, token: int, drawn: Drawn | None, now_s: float) -> None:
        self._token_times_s.append(now_s - self._submitted_s)
        if self.options.looks_back:
            self._seen[token] = None
        if self.options.counts_back:
            self._generated[token] += 1
        for record in (self._record, self._unread):
            record.token_ids.append(token)
            if drawn is not None and drawn.logprob is not None:
                logprob = TokenLogprob(token, drawn.logprob, tuple(drawn.top))
                record.logprobs.append(logprob)
        if self._pace.is_due(self._piece_s, now_s):
            self._piece_s = now_s
            self._wake.set()
        else:
            self._pace.hold(self._wake)

    def _add_text(self, cut: Cut) -> None:
        for record in (self._record, self._unread):
            record.stopped |= cut.stopped_by is not None
            if cut.text:
                record.texts.append(cut.text)


class _Record:
    """What came, in parts."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: PromptLogprobs | None = None
        self.stopped = False
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.detail = ""
        self.finished_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not self.token_ids and self.finish_reason is None and self.prompt_logprobs is None

    def as_piece(self) -> Piece:
        return Piece(
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            error=self.error,
            detail=self.detail,
            logprobs=tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
        )
