"""What a request asks for and what comes back: plain values, checked when they are made.

Pure. Knows no worker, no tokenizer and no clock; `manager.pipeline` fills these in.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from proto.errors import RequestRefused
from proto.messages import Sampling

MAX_SEED: Final = 2**63 - 1
MAX_NEW_TOKENS: Final = 2**31 - 1
MAX_LOGPROBS: Final = 100
MAX_PENALTY: Final = 2.0  # of presence and frequency, as OpenAI bounds them
MAX_BIAS: Final = 100.0
MAX_BIASES: Final = 1024  # they travel with every step
MAX_SCALE: Final = 1000.0  # of temperature and repetition penalty, as the wire bounds them


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How one request is generated. Greedy unless a temperature is given."""

    max_new_tokens: int = 128  # 0 only where the prompt's own log-probabilities are asked for
    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken off the logit of every token that was generated
    frequency_penalty: float = 0.0  # the same, once for every time
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    seed: int | None = None  # None: another one for every request
    stop: tuple[str, ...] = ()  # any of these texts ends the text and is not part of it
    stop_token_ids: tuple[int, ...] = ()  # so does any of these tokens, beside the model's own
    logprobs: int = 0  # most likely alternatives wanted with every token; 0: no log-probabilities
    prompt_logprobs: int | None = None  # the same with the prompt's tokens; None: none at all
    ignore_eos: bool = False  # the model's own end tokens do not end it; for benchmarks
    adapter: str | None = None  # by name, of those that the workers hold; None: the model alone

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        _check_whole("max_new_tokens", self.max_new_tokens, least, MAX_NEW_TOKENS)
        _check_number("temperature", self.temperature, 0, MAX_SCALE)
        _check_whole("top_k", self.top_k, 0, 2**31 - 1)
        _check_number("top_p", self.top_p, 0, 1, open_below=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, MAX_SCALE, open_below=True)
        _check_number("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_number("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_biases(self.logit_bias)
        _check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_texts("stop", self.stop)
        if self.adapter is not None and not (isinstance(self.adapter, str) and self.adapter):
            raise RequestRefused(f"adapter is {self.adapter!r}; it takes an adapter's name.")

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens seen before, those of the prompt included."""
        return self.repetition_penalty != 1.0

    @property
    def counts_back(self) -> bool:
        """Whether a draw depends on how often tokens were generated before."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def sampling(
        self,
        *,
        seed: int,
        draw: int,
        num_history: int,
        num_offsets: int = 0,
        num_mask_words: int = 0,
    ) -> Sampling:
        """These options as the wire says them, for the sequence's token number `draw`."""
        return Sampling(
            seed=seed,
            draw=draw,
            temperature=float(self.temperature),
            top_k=self.top_k,
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            logprobs=self.logprobs,
            num_history=num_history,
            num_offsets=num_offsets,
            num_mask_words=num_mask_words,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token that was drawn, and of the likeliest ones in its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """How likely each token of a prompt is behind those before it, from the second token on.

    Kept as the worker sent it, a tenth of what the values would take as objects; iterating makes
    one at a time.
    """

    token_ids: tuple[int, ...]  # the whole prompt
    num_top: int  # likeliest tokens beside each
    rows: bytes  # as docs/protocol.md has them, one a token but the first

    def __len__(self) -> int:
        return len(self.token_ids) - 1

    def __iter__(self) -> Iterator[TokenLogprob]:
        row = struct.Struct(f"<f{self.num_top}i{self.num_top}f")
        for token, (own, *top) in zip(self.token_ids[1:], row.iter_unpack(self.rows), strict=True):
            best = zip(top[: self.num_top], top[self.num_top :], strict=True)
            yield TokenLogprob(token, own, tuple(best))


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one request yielded since the last piece. The last one has a `finish_reason`."""

    text: str  # certain: never half a character, never part of a stop text; may be empty
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None  # "stop", "length", "error" or "cancelled"
    error: str | None = None  # one sentence, with finish_reason "error"
    detail: str = ""  # what "length" means, where it is not the length that was asked for
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token, where they were asked for
    prompt_logprobs: PromptLogprobs | None = None  # whole, in one piece, before the first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished request. Its text is kept even where `finish_reason` is "error"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float | None  # from the request to its first token; None without any token
    decode_tokens_per_s: float | None  # after the first token; None with fewer than two
    latency_s: float
    error: str | None = None
    detail: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
    token_times_s: tuple[float, ...] = ()  # when each token came, counted from the request


def decode_rate(times_s: Sequence[float]) -> float | None:
    """Tokens a second after the first one, from when each came; None with fewer than two."""
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return None
    return (len(times_s) - 1) / (times_s[-1] - times_s[0])


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestRefused(f"{name} is {value!r}; it takes a whole number from {low} to {high}.")


def _check_number(
    name: str, value: object, low: float, high: float, *, open_below: bool = False
) -> None:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or (open_below and number == low):
        least = f"above {low:g}" if open_below else f"from {low:g}"
        raise RequestRefused(f"{name} is {value!r}; it takes a number {least} to {high:g}.")


def _check_biases(value: tuple[tuple[int, float], ...]) -> None:
    if len(value) > MAX_BIASES:
        raise RequestRefused(f"logit_bias has {len(value)} tokens; at most {MAX_BIASES} may.")
    if len(dict(value)) < len(value):
        raise RequestRefused("logit_bias names a token twice.")
    for token, bias in value:
        _check_whole("a token of logit_bias", token, 0, 2**31 - 1)
        _check_number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS)


def _check_texts(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise RequestRefused(f"{name} is {value!r}; it takes a tuple of texts.")
    if "" in value:
        raise RequestRefused(f"a {name} text is empty; it would end the text before it begins.")


GREEDY: Final = GenerationOptions()
