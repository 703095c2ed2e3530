"""A llama-server that runs already, in the place of our own pipeline.

    async with await RemotePipeline.open("http://10.0.0.5:8080") as pipeline:
        completion = await pipeline.generate("Once upon a time")

`manager generate` and `manager batch` take it as they take a `manager.pipeline.Pipeline`; it has no
workers of ours. What is said over HTTP stands in `manager.llama_server.client`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from manager.encoding import Message, check_messages, check_text
from manager.generation import GREEDY, Completion, GenerationOptions, Piece
from manager.llama_server.client import SILENCE_S, LlamaClient
from manager.llama_server.refusals import ContextFull
from manager.llama_server.room import Place, Room
from manager.llama_server.served_model import ServedModel
from proto.errors import Error
from proto.messages import Status, WorkerFacts

# Counters of llama.cpp -> what metrics call their difference between the first request and the
# last. Those of other clients' requests are in it.
COUNTERS: Final = {
    "prompt_tokens_total": "computed_prompt_tokens",
    "prompt_seconds_total": "prompt_s",
    "tokens_predicted_total": "generated_tokens",
    "tokens_predicted_seconds_total": "decode_s",
    "n_decode_total": "decode_calls",
}

Notice = Callable[[str], None]  # a few words on what is going on


@dataclass(frozen=True, slots=True)
class Asked:
    """A plain prompt or a conversation; the server makes tokens of it."""

    text: str | None = None
    messages: tuple[Message, ...] = ()


class RemotePipeline:
    """A llama-server that is ready to generate. Made by `RemotePipeline.open`."""

    def __init__(
        self,
        client: LlamaClient,
        model: ServedModel,
        counters: Mapping[str, float] | None,
        on_notice: Notice,
    ) -> None:
        self._client, self._model, self._counters = client, model, counters
        self._room = Room(model.num_slots)
        self._on_notice = on_notice

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = SILENCE_S,
        on_progress: Notice = lambda _: None,
        on_notice: Notice = lambda _: None,
    ) -> RemotePipeline:
        """Find the server, and wait until its model is loaded.

        Args:
            url: as `manager.llama_server.server_url.parse_server` gives it.
            model: which one, where the server holds several; elsewhere the one it must hold.
            timeout_s: give up when it has said nothing for so long, to any request.
            on_progress: told what is waited for, again and again.
            on_notice: told once what a person should know.
        Raises:
            ServerUnreachable, NotLlamaServer, ApiKeyRefused, UsageError: in one sentence.
        """
        client = LlamaClient(url, api_key=api_key, model=model, timeout_s=timeout_s)
        on_progress(f"calling the llama-server at {url}")
        await client.__aenter__()
        try:
            await client.wait_until_ready(_Loading(url, on_progress, on_notice))
            return cls(client, await client.model(), await client.counters(), on_notice)
        except BaseException:
            await client.__aexit__(None, None, None)
            raise

    # --- what there is -----------------------------------------------------------------------

    @property
    def workers(self) -> tuple[WorkerFacts, ...]:
        """None of ours."""
        return ()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of workers of ours: none."""
        return ()

    @property
    def model_name(self) -> str:
        """The model's name for people."""
        return self._model.name

    @property
    def identity(self) -> dict[str, Any]:
        """What every text depends on, as far as the server tells it."""
        return {
            "model": self._model.name,
            "fingerprint": self._model.fingerprint,
            "dtype": self._model.file_type,
        }

    @property
    def holder(self) -> str:
        """A few words on who holds the model."""
        return f"{self._model.name} at {self._client.url}"

    @property
    def lost(self) -> Error | None:
        """Why no request can run any more, once that is so."""
        return self._client.lost

    async def status(self) -> list[tuple[WorkerFacts, Status, float | None]]:
        """Of workers of ours: none."""
        return []

    async def usage(self) -> dict[str, Any]:
        """{"server": ...}: what it is, and what it counted since this was opened."""
        model, counters = self._model, await self._client.counters()
        counted = None
        if counters is not None and self._counters is not None:
            counted = {
                ours: counters[theirs] - self._counters[theirs]
                for theirs, ours in COUNTERS.items()
                if theirs in counters and theirs in self._counters
            }
        return {
            "server": {
                "url": self._client.url,
                "model_path": model.path,
                "file_type": model.file_type,
                "num_parameters": model.num_parameters,
                "model_bytes": model.num_bytes,
                "context": model.context,
                "slots": model.num_slots,
                "build": model.build,
                "cached_prompt_tokens": self._client.cached_tokens,
                "requests_at_once": self._room.limit,
                "counters": counted,
            }
        }

    # --- requests ----------------------------------------------------------------------------

    def encode(self, text: str) -> Asked:
        """A plain prompt.

        Raises:
            RequestRefused: there is no text.
        """
        check_text(text)
        return Asked(text=text)

    def encode_chat(self, messages: Sequence[Message]) -> Asked:
        """A conversation.

        Raises:
            RequestRefused: there is no text in it.
        """
        check_messages(messages)
        return Asked(messages=tuple(messages))

    async def generate(
        self,
        prompt: str | Asked,
        options: GenerationOptions = GREEDY,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Completion:
        """Generate to the end. Many may run at once.

        Args:
            on_piece: called with every piece as it comes. Where the server had no room for all
                that ran at once, the request begins again, and so do its pieces.
        Raises:
            as `manager.llama_server.client.LlamaClient.complete`, but for ContextFull.
        """
        asked = self.encode(prompt) if isinstance(prompt, str) else prompt
        while True:
            async with self._room.place() as place:
                try:
                    return await self._generate(asked, options, on_piece, on_prefill)
                except ContextFull as exc:
                    if not self._make_room(place):
                        return _failed(exc.completion, on_piece)

    async def _generate(
        self,
        asked: Asked,
        options: GenerationOptions,
        on_piece: Callable[[Piece], None] | None,
        on_prefill: Callable[[int, int], None] | None,
    ) -> Completion:
        if asked.text is None:
            return await self._client.chat(asked.messages, options, on_piece, on_prefill)
        return await self._client.complete(asked.text, options, on_piece, on_prefill)

    def _make_room(self, place: Place) -> bool:
        before = self._room.limit
        runs_again = self._room.make_room(place)
        if self._room.limit != before:
            self._on_notice(
                f"the server's context is too small for all that ran at once: "
                f"going on with {self._room.limit} at a time"
            )
        return runs_again

    # --- the end -----------------------------------------------------------------------------

    async def __aenter__(self) -> RemotePipeline:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.__aexit__(kind, exc, trace)


class _Loading:
    """Says that the server loads its model: once on a line that stays, and on the moving one."""

    def __init__(self, url: str, on_progress: Notice, on_notice: Notice) -> None:
        self._text = f"the llama-server at {url} is loading its model"
        self._on_progress, self._on_notice = on_progress, on_notice
        self._is_said = False

    def __call__(self) -> None:
        if not self._is_said:
            self._on_notice(self._text)
        self._is_said = True
        self._on_progress(self._text)


def _failed(completion: Completion, on_piece: Callable[[Piece], None] | None) -> Completion:
    if on_piece is not None:
        on_piece(Piece(text="", finish_reason="error", error=completion.error))
    return completion
