"""From a request's body to sequences and an answer: prompts encoded, limits checked, model chosen.

Knows the pipeline and OpenAI's words; no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from manager.encoding import Prompt, id_outside
from manager.serve.answers import Answer, ChatAnswer
from manager.serve.completion_answer import CompletionAnswer
from manager.serve.conversation import template_messages
from manager.serve.echoes import Echo
from manager.serve.errors import ApiError, bad_value, translated
from manager.serve.fill_in import Gap, find_gap
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
from manager.serve.tools import NO_TOOLS, ToolPlan, Tools
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What the choices of one prompt have in common."""

    prompt: Prompt
    max_new_tokens: int
    num_top: int | None
    adapter: str | None
    num_choices: int
    first_choice: int = 0  # its number in the answer
    plan: ToolPlan = NO_TOOLS
    is_scored: bool = False  # the prompt's own log-probabilities are asked for
    is_ranked: bool = False  # the likeliest choices are kept
    end_tokens: tuple[int, ...] = ()  # that end a text beside the model's own

    @property
    def is_counted(self) -> bool:
        """Whether log-probabilities of what is generated are needed."""
        return self.num_top is not None or self.is_ranked


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
        adapter = await self._adapter(pipeline, request.model)
        said, limit, num_top = request.prompts(), request.limit, request.num_top
        # Without a token to follow, the choices of a prompt are all the same.
        candidates = request.num_candidates if limit else request.num_choices
        prompts = [await self._prompt(pipeline, prompt) for prompt in said]
        echoes = await self._echoes(pipeline, request, prompts) if request.echo else []
        end_tokens: tuple[int, ...] = ()
        if request.suffix:
            gap = self._gap(pipeline, request)
            prompts = [await self._with_gap(gap, it, request.suffix) for it in said]
            end_tokens = gap.end_tokens
        wanted = []
        for at, prompt in enumerate(prompts if limit or request.is_scored else []):
            draft = Draft(
                prompt=prompt,
                max_new_tokens=self._room(pipeline, prompt, limit, least=0),
                num_top=num_top,
                adapter=adapter,
                first_choice=at * candidates,
                num_choices=candidates if limit else 1,
                is_scored=request.is_scored,
                is_ranked=candidates > request.num_choices,
                end_tokens=end_tokens,
            )
            wanted += await self._choices(pipeline, request, draft)
        answer = CompletionAnswer(
            request_id,
            request.model or pipeline.model_name,
            len(prompts) * candidates,
            sum(len(prompt.token_ids) for prompt in prompts),
            include_usage=request.include_usage,
            num_top=num_top,
            token_bytes=await self._token_bytes(num_top),
            candidates=candidates,
            kept=request.num_choices if candidates > request.num_choices else None,
            echoes=echoes,
        )
        answer.end_those_not_in({it.choice for it in wanted})
        return Work(wanted, answer, adapter, request.streams)

    async def chat(self, request: ChatRequest, request_id: str) -> Work:
        """POST /v1/chat/completions.

        Raises:
            ApiError: it cannot run; says why.
        """
        pipeline = self._pipeline()
        adapter = await self._adapter(pipeline, request.model)
        assert self._tools is not None
        # For the first request with tools the template writes calls, to learn what they look like.
        tools = self._tools
        plan = await self._thread(INLINE_CHARS if request.tools else 0, lambda: tools.plan(request))
        prompt = await self._conversation(pipeline, request, plan.shown)
        limit = wanted_tokens("max_tokens", request.max_tokens)
        newer = wanted_tokens("max_completion_tokens", request.max_completion_tokens)
        tokens = self._room(pipeline, prompt, limit if newer is None else newer)
        num_top = None
        if request.logprobs:
            num_top = check_top_logprobs("top_logprobs", request.top_logprobs or 0)
        elif request.top_logprobs:
            raise bad_value("top_logprobs", "top_logprobs needs logprobs to be true.")
        draft = Draft(
            prompt=prompt,
            max_new_tokens=tokens,
            num_top=num_top,
            adapter=adapter,
            num_choices=request.num_choices,
            plan=plan,
        )
        wanted = await self._choices(pipeline, request, draft)
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

    async def _choices(self, pipeline: Pipeline, request: Common, draft: Draft) -> list[Wanted]:
        """The choices of one prompt; the first one scores it, for all of them."""
        vocab_size = pipeline.workers[0].vocab_size
        for token in request.logit_bias or {}:
            if token.isascii() and token.isdigit() and int(token) >= vocab_size:
                raise bad_value(
                    "logit_bias",
                    f"logit_bias: token id {token} is none of the model's, 0 to {vocab_size - 1}.",
                )
        wanted = []
        for choice in range(draft.num_choices):
            options = request.options(
                max_new_tokens=draft.max_new_tokens,
                logprobs=max(1, draft.num_top or 0) if draft.is_counted else 0,
                prompt_logprobs=draft.num_top if draft.is_scored and not choice else None,
                adapter=draft.adapter,
                choice=choice,
                end_tokens=draft.end_tokens,
            )
            constraint = await self._constraint(request.response_format, draft.plan.grammar)
            wanted.append(
                Wanted(
                    draft.first_choice + choice,
                    draft.prompt,
                    options,
                    constraint,
                    draft.plan.marks,
                )
            )
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
        for name in ("messages", "tools", "add_generation_prompt"):
            template.pop(name, None)
        if "chat_template" in template:
            raise bad_value(
                "chat_template_kwargs",
                "chat_template_kwargs has a chat_template; the model's own is taken: leave it out.",
            )
        if tools is not None:
            template["tools"] = tools
        if not pipeline.has_chat_template:
            raise bad_value(
                "messages",
                f"the model {pipeline.model_name} has no chat template, so it cannot read a "
                "conversation: use /v1/completions with a prompt.",
            )
        # Another process writes the text, which is waited for.
        return await self._thread(INLINE_CHARS, lambda: pipeline.encode_chat(messages, **template))

    async def _prompt(self, pipeline: Pipeline, said: str | tuple[int, ...]) -> Prompt:
        if isinstance(said, str):
            return await self._thread(len(said), lambda: pipeline.encode(said))
        if not said:
            raise bad_value("prompt", "a prompt has no token: write at least one.")
        vocab_size = pipeline.workers[0].vocab_size
        stranger = id_outside(said, vocab_size)
        if stranger is not None:
            raise bad_value(
                "prompt", f"token id {stranger} is none of the model's, 0 to {vocab_size - 1}."
            )
        return Prompt(said, continues_text=True)

    async def _echoes(
        self, pipeline: Pipeline, request: CompletionRequest, prompts: Sequence[Prompt]
    ) -> list[Echo]:
        """The prompts as they stand before their texts."""
        return [
            await self._echo(pipeline, said, prompt, is_scored=request.is_scored)
            for said, prompt in zip(request.prompts(), prompts, strict=True)
        ]

    async def _echo(
        self, pipeline: Pipeline, said: str | tuple[int, ...], prompt: Prompt, *, is_scored: bool
    ) -> Echo:
        """One of them; with its tokens' places where those are said, and the tokenizer knows."""
        if not isinstance(said, str):
            return Echo(self._text(pipeline, said), said)
        if not is_scored or not getattr(pipeline.tokenizer, "is_fast", False):
            return Echo(said, prompt.token_ids)
        found = await self._thread(
            len(said),
            lambda: pipeline.tokenizer(said, return_offsets_mapping=True, verbose=False),
        )
        if tuple(found["input_ids"]) != prompt.token_ids:
            return Echo(said, prompt.token_ids)
        return Echo(said, prompt.token_ids, tuple(int(end) for _, end in found["offset_mapping"]))

    def _gap(self, pipeline: Pipeline, request: CompletionRequest) -> Gap:
        """How the model marks a gap between a prompt and a suffix.

        Raises:
            ApiError: it does not, or the prompt cannot be scored with one.
        """
        gap = find_gap(pipeline.tokenizer, pipeline.workers[0].vocab_size)
        if gap is None:
            raise bad_value(
                "suffix",
                f"the model {pipeline.model_name} has no tokens that mark a gap in a text (such as "
                "<|fim_prefix|>), so it writes at the end only: leave suffix out.",
            )
        if request.is_scored:
            raise bad_value(
                "suffix",
                "suffix: with it the model does not read the prompt alone, so echo has no "
                "log-probabilities of it: leave out suffix, or logprobs.",
            )
        return gap

    async def _with_gap(self, gap: Gap, said: str | tuple[int, ...], suffix: str) -> Prompt:
        size = len(said) + len(suffix)
        ids = await self._thread(size, lambda: gap.prompt(said, suffix))
        return Prompt(ids, continues_text=True)

    def _room(
        self, pipeline: Pipeline, prompt: Prompt, wanted: int | None, *, least: int = 1
    ) -> int:
        """How many tokens may follow a prompt.

        Raises:
            ApiError: not so many, or none at all; says both numbers.
        """
        context, length = pipeline.max_context, len(prompt.token_ids)
        if length + (1 if wanted is None else wanted) > context:
            asked = f"{length} tokens of prompt"
            if wanted is not None:
                asked += f" and up to {wanted} to follow"
            raise bad_value(
                "messages" if wanted is None else "max_tokens",
                f"this model's context is {context} tokens; the request has {asked}: shorten it.",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted < least:
            raise bad_value("max_tokens", f"max_tokens is {wanted}; it takes at least {least}.")
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
