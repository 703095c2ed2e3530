"""What `manager generate` and `manager batch` need of whatever runs the model for them.

Our own pipeline has all of it (`manager.pipeline.Pipeline`), and so has a llama-server that is
called over HTTP (`manager.llama_server.remote.RemotePipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from manager.encoding import Message
from manager.generation import Completion, GenerationOptions, Piece
from proto.errors import Error
from proto.messages import Status, WorkerFacts


class Encodes(Protocol):
    """A text server, or the encoder of a pipeline that is not open yet."""

    def encode(self, text: str) -> Any:
        """A plain prompt, as the server takes it.

        Raises:
            RequestRefused: there is no text in it.
        """

    def encode_chat(self, messages: Sequence[Message]) -> Any:
        """A conversation, as the server takes it.

        Raises:
            UsageError: the model has no chat template.
            RequestRefused: there is no text in it.
        """


class TextServer(Encodes, Protocol):
    """Prompts in, texts out, many at once."""

    @property
    def workers(self) -> tuple[WorkerFacts, ...]:
        """Who holds the model's sections; none where no worker of ours does."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where these workers were reached, in the same order."""

    @property
    def model_name(self) -> str:
        """The model's name for people."""

    @property
    def identity(self) -> dict[str, Any]:
        """What every text depends on beside its request: the model, its weights, their type."""

    @property
    def holder(self) -> str:
        """A few words on who holds the model, for the line at the end."""

    @property
    def lost(self) -> Error | None:
        """Why no request can run any more, once that is so."""

    async def generate(
        self,
        prompt: Any,
        options: GenerationOptions = ...,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Completion:
        """Generate to the end; a request that fails on the way has its error in the completion.

        Args:
            prompt: a plain text, or what `encode` and `encode_chat` return.
            on_prefill: called with prompt tokens computed, and prompt tokens.
        Raises:
            RequestRefused: it can never run.
            Error: nothing runs any more; then `lost` says why.
        """

    async def status(self) -> list[tuple[WorkerFacts, Status, float | None]]:
        """What each worker counts now, and the round trip to it in seconds."""

    async def usage(self) -> dict[str, Any]:
        """What metrics say beside the workers' numbers; asked for when the last row is done."""
