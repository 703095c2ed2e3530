"""From a request's body to sequences and an answer: prompts encoded, limits checked, model chosen.

Knows the pipeline and OpenAI's words; no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from manager.encoding import Prompt
from manager.serve.answers import Answer, ChatAnswer, CompletionAnswer
from manager.serve.conversation import template_messages
from manager.serve.errors import ApiError, bad_value, translated
from manager.serve.generating import Wanted
from manager.serve.grammar import GrammarConstraint, Grammars, json_grammar, token_bytes
from manager.serve.keeper import Keeper
from manager.serve.requests import (
    ChatRequest,
    Common,
    CompletionRequest,
    DetokenizeRequest,
    ResponseFormat,
    TokenizeRequest,
    check_top_logprobs,
    wanted_tokens,
)
from manager.serve.tools import Tools
from proto.errors import Error

if TYPE_CHECKING:
    from manager.pipeline import Pipeline

# Tokenizers take about a millisecond for so much; longer texts are left to a thread.
INLINE_CHARS: Final = 4096
MAX_DETOKENIZED: Final = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """A request that can run."""

    wanted: list[Wanted]
    answer: Answer
    adapter: str | None
    streams: bool


class Service:
    """What the API does with the pipeline that is there now."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._for: Pipeline | None = None  # what the two below were made for
        self._grammars: Grammars | None = None
        self._tools: Tools | None = None
        self._encoding = asyncio.Lock()  # one long prompt at a time leaves the loop

    # --- models ------------------------------------------------------------------------------

    async def models(self) -> list[str]:
        """The model's own name, and the adapters that requests may name."""
        pipeline = self.keeper.ready_pipeline()
        try:
            held = await pipeline.held_adapters()
        except Error as exc:
            raise translated(exc) from exc
        return [pipeline.model_name, *dict.fromkeys([*self.keeper.adapters, *held])]

    async def _adapter(self, pipeline: Pipeline, model: str | None) -> str | None:
        """What the pipeline calls the adapter that a request names as its model.

        Raises:
            ApiError: there is no such model.
        """
        if model is None or model == pipeline.model_name:
            return None
        if model in self.keeper.adapters:
            return self.keeper.adapters[model]
        models = await self.models()
        if model in models:
            return model
        raise ApiError(
            404,
            f"the model {model[:200]!r} does not exist here; there are {', '.join(models)}.",
            code="model_not_found",
            param="model",
        )

    # --- requests ----------------------------------------------------------------------------

    async def completion(self, request: CompletionRequest, request_id: str) -> Work:
        """POST /v1/completions.

        Raises:
            ApiError: it cannot run; says why.
        """
        pipeline = self._pipeline()
        if request.suffix:
            raise bad_value("suffix", "suffix: this server writes at the end of a text only.")
        adapter = await self._adapter(pipeline, request.model)
        said = request.prompts()
        prompts = [await self._prompt(pipeline, prompt) for prompt in said]
        limit = wanted_tokens("max_tokens", request.max_tokens)
        num_top = request.logprobs
        if num_top is not None:
            check_top_logprobs("logprobs", num_top)
        if request.echo and num_top is not None:
            raise bad_value("echo", "echo: log-probabilities of the prompt are not computed here.")
        echoes = []
        if request.echo:
            texts = [it if isinstance(it, str) else self._text(pipeline, it) for it in said]
            echoes = [text for text in texts for _ in range(request.num_choices)]
        if limit == 0 and not request.echo:
            raise bad_value("max_tokens", "max_tokens is 0; it takes at least 1 unless echo is on.")
        wanted = []
        for prompt in prompts if limit != 0 else []:
            tokens = self._room(pipeline, prompt, 16 if limit is None else limit)
            wanted += await self._choices(pipeline, request, prompt, tokens, num_top, adapter)
        answer = CompletionAnswer(
            request_id,
            request.model or pipeline.model_name,
            len(prompts) * request.num_choices,
            sum(len(prompt.token_ids) for prompt in prompts),
            include_usage=request.include_usage,
            num_top=num_top,
            token_bytes=await self._token_bytes(num_top),
            echoes=echoes,
        )
        if not wanted:
            for choice in answer.choices:
                choice.finish_reason = "length"
        return Work(wanted, answer, adapter, request.streams)

    async def chat(self, request: ChatRequest, request_id: str) -> Work:
        """POST /v1/chat/completions.

        Raises:
            ApiError: it cannot run; says why.
        """
        pipeline = self._pipeline()
        adapter = await self._adapter(pipeline, request.model)
        assert self._tools is not None
        plan = self._tools.plan(request)
        prompt = await self._conversation(pipeline, request, plan.shown)
        limit = wanted_tokens("max_tokens", request.max_tokens)
        newer = wanted_tokens("max_completion_tokens", request.max_completion_tokens)
        tokens = self._room(pipeline, prompt, limit if newer is None else newer)
        num_top = None
        if request.logprobs:
            num_top = check_top_logprobs("top_logprobs", request.top_logprobs or 0)
        elif request.top_logprobs:
            raise bad_value("top_logprobs", "top_logprobs needs logprobs to be true.")
        wanted = await self._choices(
            pipeline, request, prompt, tokens, num_top, adapter, plan.grammar
        )
        answer = ChatAnswer(
            request_id,
            request.model or pipeline.model_name,
            request.num_choices,
            len(prompt.token_ids),
            include_usage=request.include_usage,
            num_top=num_top,
            token_bytes=await self._token_bytes(num_top),
            readers=[plan.reader() for _ in range(request.num_choices)] if plan.reads else [],
        )
        return Work(wanted, answer, adapter, request.streams)

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """POST /tokenize.

        Raises:
            ApiError: there is nothing to cut, or both a text and a conversation.
        """
        pipeline = self._pipeline()
        if (request.prompt is None) == (request.messages is None):
            raise bad_value("prompt", "write either prompt, a text, or messages, a conversation.")
        if request.messages is not None:
            chat = ChatRequest(messages=request.messages)
            tokens = (await self._conversation(pipeline, chat, None)).token_ids
        elif not request.prompt:
            tokens = ()
        elif not request.add_special_tokens:
            text = request.prompt
            tokens = await self._thread(
                len(text),
                lambda: tuple(
                    int(it)
                    for it in pipeline.tokenizer(text, add_special_tokens=False)["input_ids"]
                ),
            )
        else:
            tokens = (await self._prompt(pipeline, request.prompt)).token_ids
        return {
            "tokens": list(tokens),
            "count": len(tokens),
            "max_model_len": pipeline.max_context,
        }

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """POST /detokenize.

        Raises:
            ApiError: a token is none of the model's.
        """
        pipeline = self._pipeline()
        if len(request.tokens) > MAX_DETOKENIZED:
            raise bad_value("tokens", f"{len(request.tokens)} tokens; at most {MAX_DETOKENIZED}.")
        vocab_size = pipeline.workers[0].vocab_size
        for token in request.tokens:
            if not 0 <= token < vocab_size:
                raise bad_value(
                    "tokens", f"token id {token} is none of the model's, 0 to {vocab_size - 1}."
                )
        tokens = tuple(request.tokens)
        return {"prompt": await self._thread(len(tokens), lambda: self._text(pipeline, tokens))}

    # --- parts of a request ------------------------------------------------------------------

    def _pipeline(self) -> Pipeline:
        """The pipeline that is ready; what depends on it is made anew with it."""
        pipeline = self.keeper.ready_pipeline()
        if pipeline is not self._for:
            self._for = pipeline
            vocab_size = pipeline.workers[0].vocab_size
            self._grammars = Grammars(pipeline.tokenizer, vocab_size, pipeline.eos_token_ids)
            self._tools = Tools(pipeline.tokenizer)
        return pipeline

    async def _choices(
        self,
        pipeline: Pipeline,
        request: Common,
        prompt: Prompt,
        max_new_tokens: int,
        num_top: int | None,
        adapter: str | None,
        grammar: str | None = None,
    ) -> list[Wanted]:
        """The choices of one prompt."""
        vocab_size = pipeline.workers[0].vocab_size
        for token in request.logit_bias or {}:
            if token.isascii() and token.isdigit() and int(token) >= vocab_size:
                raise bad_value(
                    "logit_bias",
                    f"logit_bias: token id {token} is none of the model's, 0 to {vocab_size - 1}.",
                )
        wanted = []
        for choice in range(request.num_choices):
            options = request.options(
                max_new_tokens=max_new_tokens,
                logprobs=0 if num_top is None else max(1, num_top),
                adapter=adapter,
                choice=choice,
            )
            constraint = await self._constraint(request.response_format, grammar)
            wanted.append(Wanted(prompt, options, constraint))
        return wanted

    async def _constraint(
        self, wanted: ResponseFormat | None, grammar: str | None
    ) -> GrammarConstraint | None:
        """What limits the tokens of one choice; a grammar of calls goes before a format.

        Raises:
            ApiError: the format is unknown, or cannot be followed.
        """
        assert self._grammars is not None
        if grammar is not None:
            return await self._grammars.constraint(grammar, "tools")
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            schema: dict[str, Any] = {"type": "object"}
        elif wanted.type == "json_schema" and wanted.json_schema is not None:
            schema = wanted.json_schema.schema
        else:
            raise bad_value(
                "response_format",
                f"response_format is of type {wanted.type[:40]!r}; it is text, json_object, or "
                "json_schema with a json_schema beside it.",
            )
        made = json_grammar(schema, "response_format")
        return await self._grammars.constraint(made, "response_format")

    async def _conversation(
        self, pipeline: Pipeline, request: ChatRequest, tools: list[dict[str, Any]] | None
    ) -> Prompt:
        messages = template_messages(request.messages)
        template = dict(request.chat_template_kwargs or {})
        for name in ("tokenize", "add_generation_prompt", "conversation", "return_tensors"):
            template.pop(name, None)
        if tools is not None:
            template["tools"] = tools
        if not pipeline.has_chat_template:
            raise bad_value(
                "messages",
                f"the model {pipeline.model_name} has no chat template, so it cannot read a "
                "conversation: use /v1/completions with a prompt.",
            )
        size = sum(len(message["content"]) for message in messages)
        return await self._thread(size, lambda: pipeline.encode_chat(messages, **template))

    async def _prompt(self, pipeline: Pipeline, said: str | tuple[int, ...]) -> Prompt:
        if isinstance(said, str):
            return await self._thread(len(said), lambda: pipeline.encode(said))
        if not said:
            raise bad_value("prompt", "a prompt has no token: write at least one.")
        vocab_size = pipeline.workers[0].vocab_size
        stranger = next((it for it in said if not 0 <= it < vocab_size), None)
        if stranger is not None:
            raise bad_value(
                "prompt", f"token id {stranger} is none of the model's, 0 to {vocab_size - 1}."
            )
        return Prompt(said, continues_text=True)

    def _room(self, pipeline: Pipeline, prompt: Prompt, wanted: int | None) -> int:
        """How many tokens may follow a prompt.

        Raises:
            ApiError: not so many, or none at all; says both numbers.
        """
        context, length = pipeline.max_context, len(prompt.token_ids)
        if length >= context or (wanted is not None and length + wanted > context):
            asked = f"{length} tokens of prompt"
            if wanted is not None:
                asked += f" and up to {wanted} to follow"
            raise bad_value(
                "messages" if wanted is None else "max_tokens",
                f"this model's context is {context} tokens; the request has {asked}: shorten it.",
                code="context_length_exceeded",
            )
        if wanted == 0:
            raise bad_value("max_tokens", "max_tokens is 0; it takes at least 1.")
        return context - length if wanted is None else wanted

    async def _token_bytes(self, num_top: int | None) -> Callable[[int], bytes] | None:
        if num_top is None:
            return None
        assert self._grammars is not None
        tokenizer = await self._grammars.tokenizer()
        return lambda token: token_bytes(tokenizer, token)

    def _text(self, pipeline: Pipeline, tokens: tuple[int, ...]) -> str:
        if pipeline.tokenizer is None:
            raise bad_value("tokens", f"the model {pipeline.model_name} has no tokenizer.")
        return str(pipeline.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    async def _thread(self, size: int, work: Callable[[], T]) -> T:
        """Here if it is quick, else on a thread.

        Raises:
            ApiError: the tokenizer or the template does not take it.
        """
        try:
            if size < INLINE_CHARS:
                return work()
            async with self._encoding:
                return await asyncio.to_thread(work)
        except Error as exc:
            raise translated(exc) from exc
