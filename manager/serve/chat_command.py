"""`manager chat`: a conversation in the terminal, with a server of ours.

Lines begin with / where they are for the program. Knows the terminal and the API, no pipeline.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from manager import event_loop
from manager.cli import say
from manager.generation import GenerationOptions
from manager.options import sampling_options
from manager.serve.client import ApiClient
from manager.serve.top_command import KEY_FILE, SERVER_URL
from proto.errors import Error

HELP: Final = """\
/help            this
/reset           forget the conversation
/system [TEXT]   what the model is told first; nothing forgets it
/undo            take back the last question and its answer
/quit            leave; so does Ctrl-D
Ctrl-C ends an answer. A line that ends in \\ goes on in the next one."""
HISTORY: Final = Path("~/.cache/comboio/chat_history")


@dataclass(slots=True)
class Talk:
    """What was said."""

    system: str | None
    is_chat: bool  # False: the model has no chat template, and continues the text
    messages: list[dict[str, str]] = field(default_factory=list)

    def request(self) -> tuple[str, dict[str, Any]]:
        """The path and the part of the body that depend on the conversation."""
        if not self.is_chat:
            return "/v1/completions", {"prompt": "".join(it["content"] for it in self.messages)}
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return "/v1/chat/completions", {"messages": [*head, *self.messages]}

    def undo(self) -> None:
        """Without the last question."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass


@click.command()
@sampling_options
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@click.option("--model", metavar="NAME", help="The model, or an adapter. Default: the model.")
@SERVER_URL
@KEY_FILE
def chat(
    options: GenerationOptions,
    system: str | None,
    model: str | None,
    server: str,
    api_key_file: Path | None,
) -> None:
    """Talk with the model of a server; /help shows what else can be typed."""
    event_loop.run(talk_with(ApiClient(server, api_key_file), options, system, model))


async def talk_with(
    client: ApiClient, options: GenerationOptions, system: str | None, model: str | None
) -> None:
    """Questions and answers, until the end of the input.

    Raises:
        Error: the server is not there.
    """
    models = (await client.get("/v1/models"))["data"]
    chosen = next((it for it in models if it["id"] == model), models[0])
    if model is not None and chosen["id"] != model:
        names = ", ".join(it["id"] for it in models)
        raise Error(f"--model {model}: the server has {names}.")
    talk = Talk(system, chosen["chat"])
    body = _body(options, chosen["id"])
    if sys.stdin.isatty():
        _remember_lines()
        kind = "" if talk.is_chat else ", which continues what you write"
        say(f"{chosen['id']}{kind}; /help shows what can be typed")
    while (line := await _read()) is not None:
        if line.startswith("/"):
            if not _obey(talk, line):
                return
        elif line.strip():
            talk.messages.append({"role": "user", "content": line})
            await _answer(client, talk, body)


def _body(options: GenerationOptions, model: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
            "ignore_eos",
        )
    }
    if options.stop:
        body["stop"] = list(options.stop)
    return {**body, "model": model, "stream": True, "max_tokens": options.max_new_tokens}


def _obey(talk: Talk, line: str) -> bool:
    """Do what a /command says; False: leave."""
    command, _, rest = line.partition(" ")
    match command:
        case "/quit" | "/exit":
            return False
        case "/help":
            print(HELP, flush=True)
        case "/reset":
            talk.messages.clear()
            say("forgotten")
        case "/undo":
            talk.undo()
            say(f"{len(talk.messages)} messages are left")
        case "/system":
            talk.system = rest.strip() or None
            say("the model is told nothing first" if talk.system is None else "told first")
        case _:
            say(f"{command} is none of the commands; /help shows them")
    return True


async def _answer(client: ApiClient, talk: Talk, body: dict[str, Any]) -> None:
    """Stream one answer; Ctrl-C ends it and keeps what came."""
    path, asked = talk.request()
    said: list[str] = []
    answering = asyncio.ensure_future(_stream(client, path, {**body, **asked}, said))
    with _interrupts(answering):
        try:
            await answering
        except asyncio.CancelledError:
            if not answering.cancelled():
                raise
        except Error as exc:
            print(flush=True)
            say(str(exc))
            if not said:
                talk.undo()
                return
    print(flush=True)
    talk.messages.append({"role": "assistant", "content": "".join(said)})


async def _stream(client: ApiClient, path: str, body: dict[str, Any], said: list[str]) -> None:
    async with aclosing(client.events(path, body)) as events:
        async for event in events:
            if "error" in event:
                raise Error(event["error"]["message"])
            for choice in event["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content") or ""
                said.append(text)
                print(text, end="", flush=True)


class _interrupts:
    """While an answer comes, Ctrl-C ends it and not the program."""

    def __init__(self, answering: asyncio.Future[None]) -> None:
        self._answering = answering

    def __enter__(self) -> None:
        import signal

        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGINT, self._answering.cancel)

    def __exit__(self, *_: object) -> None:
        import signal

        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def leave() -> None:
            if task is not None:
                task.cancel()

        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(signal.SIGINT, leave)


async def _read() -> str | None:
    """The next question, its continued lines joined; None at the end of the input."""
    lines: list[str] = []
    while True:
        prompt = "" if not sys.stdin.isatty() else ("… " if lines else "› ")
        try:
            line = await event_loop.in_background(input, prompt)
        except EOFError:
            return "\n".join(lines) if lines else None
        except UnicodeDecodeError as exc:
            raise Error(f"what was typed is not UTF-8 (byte {exc.start}).") from exc
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _remember_lines() -> None:
    """Arrow keys bring back what was typed, also of earlier days."""
    with suppress(ImportError, OSError):
        import atexit
        import readline

        path = HISTORY.expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            readline.read_history_file(path)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, path)
