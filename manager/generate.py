"""`manager generate`: one prompt, its text on stdout as it comes.

Options become a `GenerateConfig`; `run` reads like the command does. The pipeline and torch, or the
client of a llama-server, load only once the options stand.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from manager import event_loop
from manager.encoding import check_text
from manager.generation import Completion, GenerationOptions, Piece
from manager.options import ADAPTER, ConnectionConfig, connection_options, sampling_options
from manager.output import Notices, TextWriter, describe_worker, summary
from proto.errors import Error, UsageError

if TYPE_CHECKING:
    from manager.encoding import Encoder
    from manager.text_server import Encodes, TextServer


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What `manager generate` was asked for."""

    prompt: str
    options: GenerationOptions  # with the adapter as the command line says it
    connection: ConnectionConfig
    chat: bool = False
    system: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        check_text(self.prompt)
        if self.system is not None and not self.chat:
            raise UsageError("--system belongs to a conversation: pass --chat as well.")

    def encode(self, encoder: Encodes) -> Any:
        """The prompt, as the server takes it: of an encoder, its tokens."""
        if not self.chat:
            return encoder.encode(self.prompt)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return encoder.encode_chat([*system, {"role": "user", "content": self.prompt}])


@click.command()
@click.argument("prompt")
@sampling_options
@click.option("--chat", is_flag=True, help="The prompt is a message, in the model's chat template.")
@click.option("--system", metavar="TEXT", help="With --chat: what the model is told first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead.")
@ADAPTER
@connection_options
def generate(
    prompt: str, adapter: str | None, options: GenerationOptions, **values: object
) -> None:
    """Continue PROMPT, or answer it with --chat; text streams to stdout as it comes.

    A PROMPT of - is read from stdin, without the line break at its end.
    """
    text = read_stdin() if prompt == "-" else prompt
    options = replace(options, adapter=adapter)
    config = GenerateConfig(prompt=text, options=options, **values)  # type: ignore[arg-type]
    event_loop.run(run(config))


async def run(config: GenerateConfig) -> None:
    """Open what runs the model, stream, say how it went.

    Raises:
        Error: in one sentence; the text so far is on stdout.
    """
    from manager.connection import open_server

    notices, prompts = Notices(), list[Any]()

    def count_tokens(encoder: Encoder) -> int:
        prompts.append(config.encode(encoder))
        return len(prompts[0].token_ids) + config.options.max_new_tokens

    try:
        async with open_server(
            config.connection,
            notices,
            max_sequences=1,
            max_tokens_hint=count_tokens,
            adapters=[] if config.options.adapter is None else [config.options.adapter],
        ) as server:
            prompt = prompts[0] if prompts else config.encode(server)
            shown = _Shown(config, notices)
            try:
                completion = await server.generate(
                    prompt, config.options, on_piece=shown.piece, on_prefill=shown.prefill
                )
            finally:
                await shown.end_text()
            if config.as_json:
                print(as_json(completion, server), flush=True)
            if completion.error is not None:
                raise Error(completion.error) from server.lost
            notices.say(summary(completion, server.holder))
    finally:
        notices.clear()


def read_stdin() -> str:
    """All of stdin as a prompt.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"the prompt on stdin is not UTF-8 (byte {exc.start}).") from exc
    # What `echo` and editors put there is not part of the prompt.
    return text.removesuffix("\n").removesuffix("\r")


def as_json(completion: Completion, server: TextServer) -> str:
    """What --json prints: these keys, no others."""
    workers = zip(server.addresses, server.workers, strict=True)
    return json.dumps(
        {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "ttft_s": completion.ttft_s,
            "decode_tokens_per_s": completion.decode_tokens_per_s,
            "workers": [describe_worker(address, facts) for address, facts in workers],
        },
        ensure_ascii=False,
    )


class _Shown:
    """The text on stdout, and how far the prompt is read on stderr."""

    def __init__(self, config: GenerateConfig, notices: Notices) -> None:
        self._notices = notices
        self._writer = None if config.as_json else TextWriter(sys.stdout)

    def piece(self, piece: Piece) -> None:
        if self._writer is not None and piece.text:
            self._notices.clear()  # before text: both may be on one terminal
            self._writer.write(piece.text)

    def prefill(self, done: int, total: int) -> None:
        if done < total:
            self._notices.show(f"reading the prompt: {done} of {total} tokens", done, total)

    async def end_text(self) -> None:
        """All text is out, and its last line is ended."""
        self._notices.clear()
        if self._writer is not None:
            if self._writer.last_char not in ("", "\n"):
                self._writer.write("\n")
            await self._writer.close()
