"""Call a running llama-server with the `openai` package: texts as they come, and what it says of
itself.

    async with LlamaClient("http://10.0.0.5:8080") as client:
        await client.wait_until_ready()
        completion = await client.chat([{"role": "user", "content": "Hello"}], options)

Errors become sentences of ours. A text is what the model generated, thoughts and all, as our own
pipeline gives it: a conversation goes through the server's chat template first, and then to
/v1/completions, which alone tells token ids. Loads `openai` when it is entered.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from manager.encoding import Message, check_messages, check_text
from manager.event_loop import in_background
from manager.generation import GREEDY, Completion, GenerationOptions
from manager.llama_server.answer import Answer, Gap, OnPiece, OnPrefill, read_event
from manager.llama_server.patience import Patience
from manager.llama_server.refusals import (
    CONTEXT_FULL,
    ApiKeyRefused,
    ContextFull,
    NotLlamaServer,
    ServerLost,
    ServerUnreachable,
    message_of,
    reason_of,
    refusal_of,
    said_by,
)
from manager.llama_server.request import request_body
from manager.llama_server.served_model import (
    ROUTER,
    ServedModel,
    choose_model,
    is_props,
    read_model,
)
from manager.llama_server.server_url import API
from manager.text import REPLACEMENT
from proto.errors import UsageError

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, AsyncOpenAI

# A prompt of thousands of tokens over several slow nodes takes minutes, and then the first news
# of it is all there is to tell a server that works from one whose RPC worker hangs: its /health
# stays good, and it sends signs of life on every stream.
SILENCE_S: Final = 600.0
CONNECT_S: Final = 10.0
ANSWER_S: Final = 30.0  # to a question about the server itself; it may be busy
LOADING_POLL_S: Final = 0.3
LOADING_S: Final = 3600.0  # a large model through RPC over slow links

NO_KEY: Final = "sk-no-key-required"  # what llama.cpp's own examples send where none is asked for

# Status codes of a server that is not there: its own, or those of a proxy in front of it.
AWAY: Final = {
    502: "a proxy in front of it cannot reach it",
    503: "it loads its model again",
    504: "a proxy in front of it gave it up",
}

HTTP_LIBRARIES: Final = ("httpx", "httpx2")

# llama-server says `Keep-Alive` after a stream and closes the socket all the same.
HEADERS: Final = {"Connection": "close"}


class LlamaClient:
    """One server, called by many at once.

    Args:
        url: as `manager.llama_server.server_url.parse_server` gives it.
        model: which one, where the server holds several.
        timeout_s: a request fails when the server has said nothing, to any request of this
            client, for so long.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = SILENCE_S,
    ) -> None:
        self.url, self._api_key, self._wanted_model = url, api_key, model
        self._patience = Patience(timeout_s)
        self._timeout_s = timeout_s
        self._model: ServedModel | None = None
        self._spellings: dict[str, tuple[int, ...]] = {}  # token ids of short texts
        self.cached_tokens = 0  # of prompts, which the server did not compute again
        self.lost: ServerLost | None = None  # set: no request can run any more

    async def __aenter__(self) -> LlamaClient:
        self._openai = await in_background(_import_openai)
        # Before its release 3, `openai` let those of its HTTP library through in a stream.
        self._transport_errors: tuple[type[Exception], ...] = tuple(
            sys.modules[name].TransportError for name in HTTP_LIBRARIES if name in sys.modules
        )
        self._client: AsyncOpenAI = self._openai.AsyncOpenAI(
            base_url=self.url + API,
            api_key=self._api_key or NO_KEY,
            # A request that waits for its turn hears nothing; `Patience` knows of the others.
            timeout=self._openai.Timeout(None, connect=CONNECT_S),
            default_headers=HEADERS,
            # Clusters set HTTP_PROXY for the outer world; a node is no part of it.
            http_client=self._openai.DefaultAsyncHttpxClient(
                trust_env=self.url.startswith("https:")
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    # --- what the server says of itself ------------------------------------------------------

    async def health(self) -> bool:
        """Whether the model is loaded; False while it loads.

        Raises:
            ServerUnreachable: nothing answers.
            NotLlamaServer: something else does.
            ApiKeyRefused: whoever stands before the server asks for a key.
        """
        openai = self._openai
        try:
            answer = await self._ask("/health", timeout_s=ANSWER_S)
        except openai.APIConnectionError as exc:
            raise ServerUnreachable(self.url, reason_of(exc)) from exc
        except openai.APIStatusError as exc:
            if exc.status_code == 503 and said_by(exc).get("type") == "unavailable_error":
                return False
            self._check_key(exc)
            raise NotLlamaServer(self.url, f"GET /health gave {exc.status_code}") from exc
        if not isinstance(answer, dict) or answer.get("status") != "ok":
            raise NotLlamaServer(self.url, "GET /health gave something else than its state")
        return True

    async def wait_until_ready(
        self, on_loading: Callable[[], None] = lambda: None, *, timeout_s: float = LOADING_S
    ) -> None:
        """Wait while the server loads its model.

        Args:
            on_loading: called each time it says that it loads.
        Raises:
            ServerUnreachable, NotLlamaServer, ApiKeyRefused: as `health`.
        """
        give_up_s = time.monotonic() + timeout_s
        while not await self.health():
            on_loading()
            if time.monotonic() > give_up_s:
                raise ServerUnreachable(
                    self.url, f"it was still loading its model after {timeout_s / 60:.0f} minutes"
                )
            await asyncio.sleep(LOADING_POLL_S)

    async def model(self) -> ServedModel:
        """The model that it holds; of several, the one that was asked for.

        Raises:
            ApiKeyRefused, NotLlamaServer, ServerUnreachable: as `health`.
            UsageError: it holds another one.
        """
        if self._model is None:
            self._model = await self._read_model()
        return self._model

    async def counters(self) -> dict[str, float] | None:
        """What it has counted since its start; None unless it was started with --metrics.

        `prompt_tokens_total`, `tokens_predicted_total` and others, named as llama.cpp does.
        """
        try:
            text = await self._ask("/metrics", cast_to=str, timeout_s=ANSWER_S)
        except self._openai.APIError:
            return None
        lines = (line.split() for line in text.splitlines() if line.startswith("llamacpp:"))
        try:
            return {words[0].removeprefix("llamacpp:"): float(words[1]) for words in lines}
        except (IndexError, ValueError):
            return None

    # --- requests ----------------------------------------------------------------------------

    async def chat(
        self,
        messages: Sequence[Message],
        options: GenerationOptions = GREEDY,
        on_piece: OnPiece | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Completion:
        """Answer a conversation, in the model's chat template.

        Raises:
            as `complete`; RequestRefused also when the template does not take the conversation.
        """
        check_messages(messages)
        return await self._generate(messages, options, on_piece, on_prefill)

    async def complete(
        self,
        prompt: str,
        options: GenerationOptions = GREEDY,
        on_piece: OnPiece | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Completion:
        """Continue a text. A request that fails on the way has its error in the completion.

        Args:
            on_piece: called with every piece as it comes; an error that it raises ends the request.
            on_prefill: called with prompt tokens computed, and prompt tokens.
        Raises:
            RequestRefused: it can never run: empty, longer than the context, or with options that
                the server has no counterpart of.
            ContextFull: what runs at the same time fills the server's memory.
            ApiKeyRefused, NotLlamaServer: none can run.
            ServerLost: the server was lost before the request.
        """
        check_text(prompt)
        return await self._generate(prompt, options, on_piece, on_prefill)

    async def _generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerationOptions,
        on_piece: OnPiece | None,
        on_prefill: OnPrefill | None,
    ) -> Completion:
        if self.lost is not None:
            raise self.lost
        model = await self.model()
        body = request_body(options, model.context)
        answer = Answer(options, on_piece, on_prefill)
        started_s = time.monotonic()
        error: str | None = None
        try:
            async with self._patience.wait():
                text = prompt if isinstance(prompt, str) else await self._apply_template(prompt)
                await self._read(answer, text, body, started_s)
        except self._transport_errors as exc:
            error = self._lose(reason_of(exc))
        except TimeoutError:
            error = self._lose(f"it has said nothing for {self._timeout_s:g} s")
        except self._openai.APIError as exc:
            error = self._failure(exc)
            if CONTEXT_FULL in message_of(exc):
                latency_s = time.monotonic() - started_s
                raise ContextFull(answer.end(latency_s, error=error)) from exc
        latency_s = time.monotonic() - started_s
        self.cached_tokens += answer.cached_tokens
        if error is None and not answer.is_finished:
            error = self._lose("it broke off in the middle of an answer")
        if error is None:
            answer.fill([(gap, await self._ids_of(gap)) for gap in answer.gaps])
        completion = answer.end(latency_s, error=error, context=model.context)
        answer.give_last_piece(completion)
        return completion

    async def _read(
        self, answer: Answer, prompt: str, body: Mapping[str, object], started_s: float
    ) -> None:
        model = await self.model()
        options = answer.options
        stream = await self._client.completions.create(
            model=model.id,
            prompt=prompt,
            max_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            presence_penalty=0,
            frequency_penalty=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        async with stream:
            async for chunk in stream:
                self._patience.heard()
                answer.take(read_event(chunk), time.monotonic() - started_s)
                if answer.is_stopped:
                    return  # closing the stream ends it at the server

    async def _apply_template(self, messages: Sequence[Message]) -> str:
        model = await self.model()
        answer = await self._tell(
            "/apply-template",
            {"model": model.id, "messages": [dict(message) for message in messages]},
        )
        if not isinstance(answer, dict) or not isinstance(answer.get("prompt"), str):
            raise NotLlamaServer(self.url, "POST /apply-template gave no prompt")
        return str(answer["prompt"])

    async def _ids_of(self, gap: Gap) -> tuple[int, ...]:
        """All token ids of a text of which the server told the last ones only.

        Another spelling of the same text is possible, if hardly ever seen; bytes that are no text
        have none, and their ids are left out.
        """
        if REPLACEMENT in gap.text:
            return gap.token_ids
        if gap.text not in self._spellings:
            model = await self.model()
            try:
                answer = await self._tell("/tokenize", {"model": model.id, "content": gap.text})
            except self._openai.APIError:
                return gap.token_ids  # the text is there; this is no reason to lose it
            ids = answer.get("tokens", ()) if isinstance(answer, dict) else ()
            self._spellings[gap.text] = tuple(map(int, ids))
        return self._spellings[gap.text] or gap.token_ids

    # --- inside ------------------------------------------------------------------------------

    async def _read_model(self) -> ServedModel:
        openai = self._openai
        try:
            listed = await self._ask("/v1/models", timeout_s=ANSWER_S)
            models = listed.get("data") if isinstance(listed, dict) else None
            if not isinstance(models, list):
                raise NotLlamaServer(self.url, "GET /v1/models gave no list of models")
            props = await self._ask("/props", timeout_s=ANSWER_S)
            if not is_props(props):
                raise NotLlamaServer(self.url, "GET /props gave something else than its settings")
            model_id = choose_model(models, self._wanted_model, self.url)
            if props.get("role") == ROUTER:  # the model's own, once it is loaded
                props = await self._ask(f"/props?model={quote(model_id)}", timeout_s=LOADING_S)
        except openai.APIConnectionError as exc:
            raise ServerUnreachable(self.url, reason_of(exc)) from exc
        except openai.APIStatusError as exc:
            self._check_key(exc)
            raise NotLlamaServer(self.url, f"it answers {exc.status_code}") from exc
        listed_as = next(it for it in models if it.get("id") == model_id)
        return read_model(model_id, props, listed_as.get("meta") or {})

    def _check_key(self, exc: APIStatusError) -> None:
        if exc.status_code in (401, 403):
            raise ApiKeyRefused(self.url, has_key=self._api_key is not None) from exc

    def _failure(self, exc: APIError) -> str:
        """Why a request failed; raises what is no fault of this one alone, or can never run."""
        openai = self._openai
        if isinstance(exc, openai.APIConnectionError):
            return self._lose(reason_of(exc))
        if isinstance(exc, openai.APIStatusError):
            self._check_key(exc)
            if exc.status_code == 400:
                raise refusal_of(exc) from exc
            if exc.status_code == 404:
                raise NotLlamaServer(self.url, f"it answers {exc.status_code}") from exc
            if exc.status_code in AWAY:
                return self._lose(AWAY[exc.status_code])
        return f"llama-server failed: {message_of(exc)}"

    def _lose(self, reason: str) -> str:
        self.lost = self.lost or ServerLost(self.url, reason)
        return str(self.lost)

    async def _ask(self, path: str, *, timeout_s: float, cast_to: Any = object) -> Any:
        client = self._client.with_options(timeout=timeout_s, max_retries=0)
        return await client.get(self.url + path, cast_to=cast_to)

    async def _tell(self, path: str, body: Mapping[str, object]) -> Any:
        client = self._client.with_options(timeout=self._timeout_s)
        return await client.post(self.url + path, body=body, cast_to=object)


def _import_openai() -> ModuleType:
    try:
        return import_module("openai")
    except ImportError as exc:
        raise UsageError(
            f"calling a llama-server needs the openai package, which cannot be imported ({exc}): "
            "run `pip install openai`."
        ) from exc
