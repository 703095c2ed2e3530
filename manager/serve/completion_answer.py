"""The answer of /v1/completions: texts, with their prompts in front where that was asked for.

A prompt is echoed with the log-probabilities of its tokens once they are there, whole; what came of
other choices of that prompt before waits for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from manager.generation import Piece, PromptLogprobs, TokenLogprob
from manager.serve.answers import Answer, Choice, encode
from manager.serve.echoes import Echo, Place

# JSON has no infinity: what OpenAI writes for a token that cannot come.
IMPOSSIBLE: Final = -9999.0


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        *args: Any,
        candidates: int = 1,
        kept: int | None = None,
        echoes: Sequence[Echo] = (),
        **values: Any,
    ) -> None:
        """
        Args:
            candidates: texts of each prompt; they follow each other.
            kept: of these, the likeliest so many are the answer; None: all, as they come.
            echoes: of each prompt, where it is to stand before its texts.
        """
        super().__init__(*args, **values)
        self._candidates, self._kept = candidates, kept
        self._echoes = list(echoes)
        self._is_scored = bool(echoes) and self._num_top is not None
        self._scores: dict[int, PromptLogprobs] = {}  # by prompt
        self._said_of: dict[int, dict[str, Any]] = {}  # the same as the client reads it
        self._early = defaultdict[int, list[Piece]](list)  # by choice: before its prompt's echo
        if self._num_top is not None:
            self.num_echoed = sum(len(it.token_ids) for it in echoes) * (1 + self._num_top)
        self._places = [Place(len(self._echo_text(at))) for at in range(len(self.choices))]

    def end_those_not_in(self, running: set[int]) -> None:
        """The choices that no sequence writes are as long as they were to be already."""
        for index, choice in enumerate(self.choices):
            if index not in running:
                choice.finish_reason = "length"

    # --- a stream ----------------------------------------------------------------------------

    def opening(self) -> bytes:
        if self._is_scored:
            return b""
        prompts = range(len(self._echoes))
        return b"".join(self._echoed(prompt) for prompt in prompts if self._echoes[prompt].text)

    def events(self, index: int, piece: Piece) -> bytes:
        prompt = index // self._candidates
        if not self._is_scored or prompt in self._scores:
            return self._text_event(index, piece)
        self._early[index].append(piece)
        if piece.prompt_logprobs is None:
            return b""
        self._scores[prompt] = piece.prompt_logprobs
        return self._echoed(prompt) + b"".join(
            self._text_event(at, early)
            for at in self._choices_of(prompt)
            for early in self._early.pop(at, [])
        )

    def _echoed(self, prompt: int) -> bytes:
        """A prompt, as the first event of each of its choices."""
        logprobs = encode(self._prompt_logprobs(prompt)) if self._is_scored else b"null"
        text = self._echoes[prompt].text
        return b"".join(
            self._event(self._part(at, text, self.choices[at].finish_reason, logprobs))
            for at in self._choices_of(prompt)
        )

    def _text_event(self, index: int, piece: Piece) -> bytes:
        self.choices[index].add(piece)
        if not piece.text and not piece.logprobs and piece.finish_reason is None:
            return b""
        logprobs = b"null"
        if self._num_top is not None:
            logprobs = encode(self._logprobs(index, piece.logprobs))
        return self._event(self._part(index, piece.text, piece.finish_reason, logprobs))

    def _part(self, index: int, text: str, finish_reason: str | None, logprobs: bytes) -> bytes:
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            encode(text),
            logprobs,
            encode(finish_reason),
        )

    # --- at once -----------------------------------------------------------------------------

    def add(self, index: int, piece: Piece) -> None:
        super().add(index, piece)
        if piece.prompt_logprobs is not None:
            self._scores[index // self._candidates] = piece.prompt_logprobs

    def _answered(self) -> Iterable[int]:
        if self._kept is None:
            return range(len(self.choices))
        prompts = range(0, len(self.choices), self._candidates)
        return (
            at
            for first in prompts
            for at in sorted(range(first, first + self._candidates), key=self._unlikeliness)[
                : self._kept
            ]
        )

    def _unlikeliness(self, index: int) -> float:
        """Of a choice: the mean of its tokens' log-probabilities, negative."""
        logprobs = self.choices[index].logprobs
        return -sum(it.logprob for it in logprobs) / max(1, len(logprobs))

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = None
        if self._num_top is not None:
            logprobs = self._logprobs(index, choice.logprobs)
            if self._is_scored:
                before = self._prompt_logprobs(index // self._candidates)
                logprobs = {
                    name: None if part is None else before[name] + part
                    for name, part in logprobs.items()
                }
        return {
            "index": index,
            "text": self._echo_text(index) + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    # --- log-probabilities -------------------------------------------------------------------

    def _prompt_logprobs(self, prompt: int) -> dict[str, Any]:
        """Of a prompt's tokens; the first one has nothing before it."""
        if prompt not in self._said_of:
            echo = self._echoes[prompt]
            texts, numbers, tops = self._said(self._scores[prompt])
            self._said_of[prompt] = {
                "tokens": [self._token(echo.token_ids[0])[0], *texts],
                "token_logprobs": [None, *numbers],
                "top_logprobs": [None, *tops] if self._num_top else None,
                "text_offset": echo.offsets(lambda token: self._token(token)[1]),
            }
        return self._said_of[prompt]

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of generated tokens."""
        place, offsets = self._places[index], []
        for it in logprobs:
            offsets.append(place.chars)
            place.add(self._token(it.token_id)[1])
        tokens, numbers, tops = self._said(logprobs)
        return {
            "tokens": tokens,
            "token_logprobs": numbers,
            "top_logprobs": tops if self._num_top else None,
            "text_offset": offsets,
        }

    def _said(self, logprobs: Iterable[TokenLogprob]) -> tuple[list[Any], list[Any], list[Any]]:
        """Texts, numbers, and the likeliest tokens beside each."""
        texts, numbers, tops = [], [], []
        for it in logprobs:
            text, number = self._token(it.token_id)[0], max(it.logprob, IMPOSSIBLE)
            texts.append(text)
            numbers.append(number)
            top: dict[str, float] = {}
            for token, value in it.top[: self._num_top]:
                # Two tokens may look the same, as halves of characters do: the likelier one counts.
                top.setdefault(self._token(token)[0], max(value, IMPOSSIBLE))
            top.setdefault(text, number)
            tops.append(top)
        return texts, numbers, tops

    def _echo_text(self, index: int) -> str:
        return self._echoes[index // self._candidates].text if self._echoes else ""

    def _choices_of(self, prompt: int) -> range:
        return range(prompt * self._candidates, (prompt + 1) * self._candidates)
