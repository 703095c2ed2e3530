"""What clients may ask for: OpenAI's request bodies, checked field by field.

Unknown fields are left alone, as OpenAI does; a field of a wrong type is refused by name. Pure:
bytes in, values out. Knows no model, no tokenizer and no server.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar, cast

import msgspec

from manager.generation import MAX_SEED, GenerationOptions
from manager.serve.errors import bad_value
from proto.errors import RequestRefused

MAX_CHOICES: Final = 128
MAX_PROMPTS: Final = 1024
MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1000
MAX_TOP_LOGPROBS: Final = 20

Stop = str | list[str] | None


class StreamOptions(msgspec.Struct, kw_only=True):
    """How a stream ends."""

    include_usage: bool | None = False


class JsonSchema(msgspec.Struct, kw_only=True):
    """A schema that the text must follow."""

    name: str = "answer"
    schema: dict[str, Any] = {}
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What the text must look like."""

    type: str = "text"
    json_schema: JsonSchema | None = None


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may ask for."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """Something that the model may ask for."""

    type: str = "function"
    function: Function


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """A function that the model asked for in an earlier turn."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, kw_only=True):
    """One call in an earlier turn."""

    id: str | None = None
    type: str = "function"
    function: CalledFunction


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Common(msgspec.Struct, kw_only=True):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = 1
    stop: Stop = None
    seed: int | None = None
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: int | None = 0
    min_p: float | None = 0.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repetition_penalty: float | None = 1.0
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = False
    response_format: ResponseFormat | None = None
    user: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes piece by piece."""
        return bool(self.stream)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_choices(self) -> int:
        """Texts wanted of every prompt.

        Raises:
            ApiError: none, or more than anybody needs.
        """
        number = 1 if self.n is None else self.n
        if not 1 <= number <= MAX_CHOICES:
            raise bad_value("n", f"n is {number}; it takes a whole number from 1 to {MAX_CHOICES}.")
        return number

    def options(
        self,
        *,
        max_new_tokens: int,
        logprobs: int,
        adapter: str | None,
        choice: int,
        prompt_logprobs: int | None = None,
        end_tokens: tuple[int, ...] = (),
    ) -> GenerationOptions:
        """How choice number `choice` is generated.

        Args:
            end_tokens: that end it beside the model's own.
        Raises:
            ApiError: a value is out of its bounds.
        """
        try:
            return GenerationOptions(
                max_new_tokens=max_new_tokens,
                temperature=_or(self.temperature, 1.0),
                top_k=max(0, _or(self.top_k, 0)),  # -1 is "off" elsewhere
                top_p=_or(self.top_p, 1.0),
                min_p=_or(self.min_p, 0.0),
                repetition_penalty=_or(self.repetition_penalty, 1.0),
                presence_penalty=_or(self.presence_penalty, 0.0),
                frequency_penalty=_or(self.frequency_penalty, 0.0),
                logit_bias=self._biases(),
                # Any whole number is a seed; each choice has one of its own.
                seed=None if self.seed is None else (self.seed + choice) & MAX_SEED,
                stop=self._stops(),
                stop_token_ids=() if self.ignore_eos else end_tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                ignore_eos=bool(self.ignore_eos),
                adapter=adapter,
            )
        except RequestRefused as exc:
            raise bad_value(_named_first(str(exc)), str(exc)) from exc

    def _stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise bad_value("stop", f"stop has {len(stops)} texts; at most {MAX_STOPS} may be.")
        if any(len(stop) > MAX_STOP_CHARS for stop in stops):
            raise bad_value("stop", f"a stop text has more than {MAX_STOP_CHARS} characters.")
        return tuple(stops)

    def _biases(self) -> tuple[tuple[int, float], ...]:
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not re.fullmatch(r"\d{1,10}", token, re.ASCII):
                raise bad_value("logit_bias", f"logit_bias: {token[:40]!r} is no token id.")
            biases.append((int(token), bias))
        return tuple(biases)


class CompletionRequest(Common, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None

    @property
    def limit(self) -> int:
        """Tokens that may follow each prompt.

        Raises:
            ApiError: negative; or none, and the prompt is not wanted either.
        """
        limit = wanted_tokens("max_tokens", _or(self.max_tokens, 16))
        if not limit and not self.echo:
            raise bad_value("max_tokens", "max_tokens is 0; it takes at least 1 unless echo is on.")
        return limit or 0

    @property
    def num_top(self) -> int | None:
        """Alternatives wanted beside every token; None: no log-probabilities.

        Raises:
            ApiError: more than there may be.
        """
        return None if self.logprobs is None else check_top_logprobs("logprobs", self.logprobs)

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are wanted."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def num_candidates(self) -> int:
        """Texts to generate of every prompt; `num_choices` of them are the answer.

        Raises:
            ApiError: fewer than are to be the answer, more than anybody needs, or in a stream.
        """
        if self.best_of is None:
            return self.num_choices
        if not self.num_choices <= self.best_of <= MAX_CHOICES:
            raise bad_value(
                "best_of",
                f"best_of is {self.best_of}; it takes a whole number from n, {self.num_choices}, "
                f"to {MAX_CHOICES}.",
            )
        if self.streams and self.best_of > self.num_choices:
            raise bad_value(
                "best_of",
                f"best_of is {self.best_of} and n {self.num_choices}: which texts are the best is "
                "known at their end, so leave stream out.",
            )
        return self.best_of

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt, as text or as token ids.

        Raises:
            ApiError: there is none, or they are of several kinds.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(part) for part in self.prompt}
        if len(kinds) != 1:
            why = "is an empty list" if not kinds else "mixes texts, token ids and lists"
            raise bad_value("prompt", f"prompt {why}: write texts, or lists of token ids.")
        if kinds == {int}:
            return [tuple(cast("list[int]", self.prompt))]
        if len(self.prompt) > MAX_PROMPTS:
            raise bad_value("prompt", f"{len(self.prompt)} prompts; at most {MAX_PROMPTS} may be.")
        return [tuple(it) if isinstance(it, list) else str(it) for it in self.prompt]


class ChatRequest(Common, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


Body = TypeVar("Body", bound=msgspec.Struct)
DECODERS: Final[dict[type[Any], msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
}


def read_body(kind: type[Body], body: bytes) -> Body:
    """A request's body.

    Raises:
        ApiError: it is no JSON, or a field has another type; names the field.
    """
    try:
        read: Body = DECODERS[kind].decode(body)
    except msgspec.ValidationError as exc:
        what, _, where = str(exc).partition(" - at `$")
        field = where.strip("`.").removeprefix("[...]") or None
        said = f"{field}: {what[:1].lower()}{what[1:]}." if field else f"{what}."
        raise bad_value(None if field is None else re.split(r"[.\[]", field)[0], said) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise bad_value(None, f"the body is no JSON: {exc}.") from exc
    return read


def wanted_tokens(name: str, value: int | None) -> int | None:
    """A limit of tokens, where there is one.

    Raises:
        ApiError: it is negative.
    """
    if value is not None and value < 0:
        raise bad_value(name, f"{name} is {value}; it takes a whole number from 0.")
    return value


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _named_first(sentence: str) -> str | None:
    """The field that an error sentence begins with."""
    word = sentence.partition(" ")[0]
    return word if word in GenerationOptions.__slots__ else None


def check_top_logprobs(name: str, value: int) -> int:
    """How many alternatives are wanted.

    Raises:
        ApiError: more than there may be.
    """
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise bad_value(
            name, f"{name} is {value}; it takes a whole number from 0 to {MAX_TOP_LOGPROBS}."
        )
    return value
