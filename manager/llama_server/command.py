"""`manager llama-server`: its subcommands by name."""

from __future__ import annotations

from typing import Final

from manager.cli import LazyGroup

COMMANDS: Final[dict[str, tuple[str, str, str]]] = {
    "run": (
        "manager.llama_server.run_command",
        "run",
        "Start it with its rpc-servers, ask, and end it.",
    ),
}

llama_server = LazyGroup(
    name="llama-server",
    commands=COMMANDS,
    help="Run llama.cpp's llama-server with its RPC workers, on this machine.",
)
