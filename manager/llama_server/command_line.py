"""The command line of llama-server: which words say what was asked, to the version that is here.

Arithmetic over values; starts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manager.llama_server.binaries import ServerProgram
from manager.llama_server.gguf_file import ModelFile
from manager.llama_server.memory import context_of
from proto.errors import UsageError

if TYPE_CHECKING:
    from manager.llama_server.config import LlamaServerConfig

MIN_GPU_LAYERS: Final = 99  # "all of them", to versions that do not know the word

# What is ours to set: word -> why.
RESERVED: Final = {
    **dict.fromkeys(("-m", "--model"), "model sets it"),
    **dict.fromkeys(("--host",), "it listens where its caller is"),
    **dict.fromkeys(("--port",), "port_server sets it"),
    **dict.fromkeys(("--rpc",), "nodes sets it"),
    **dict.fromkeys(("--api-key",), "everybody can read a command line, api_key_file sets it"),
    **dict.fromkeys(("-c", "--ctx-size"), "context sets it"),
    **dict.fromkeys(("-np", "--parallel"), "parallel sets it"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How llama-server runs. None: as it does by itself."""

    model: Path
    num_layers: int
    host: str
    port: int
    context: int  # tokens of one sequence
    parallel: int  # sequences at once
    n_gpu_layers: str | None = None
    tensor_split: Sequence[float] | None = None
    split_mode: str | None = None
    ubatch_size: int | None = None
    threads: int | None = None
    cache_ram: int = 0  # MiB
    alias: str | None = None
    api_key_file: Path | None = None
    more_words: Sequence[str] = ()


def settings_of(
    config: LlamaServerConfig,
    model: ModelFile,
    *,
    host: str,
    port: int,
    parallel: int,
    threads: int | None,
) -> ServerSettings:
    """What a configuration says of llama-server.

    Args:
        parallel: sequences at once, where the configuration does not say.
        threads: the same.
    """
    return ServerSettings(
        model=model.path,
        num_layers=model.num_layers,
        host=host,
        port=port,
        context=context_of(model, config.context),
        parallel=config.parallel or parallel,
        n_gpu_layers=config.n_gpu_layers,
        tensor_split=config.tensor_split,
        split_mode=config.split_mode,
        ubatch_size=config.ubatch_size,
        threads=config.threads or threads,
        cache_ram=config.cache_ram,
        alias=config.alias,
        api_key_file=config.api_key_file,
        more_words=config.server_args,
    )


def server_words(
    program: ServerProgram, settings: ServerSettings, rpc_addresses: Sequence[str]
) -> list[str]:
    """The words that start it.

    Raises:
        UsageError: this version knows no flag for something that was asked, or `more_words` sets
            what is set here.
    """
    shares = settings.tensor_split
    if shares is not None and len(shares) < len(rpc_addresses):
        raise UsageError(
            f"tensor_split has {len(shares)} shares and there are {len(rpc_addresses)} "
            "rpc-servers, so that some would hold nothing: give each a share."
        )
    line = _Line(program)
    line.add(("-m",), str(settings.model), asked="model")
    line.add(("--host",), settings.host, asked="host")
    # Always said: the port that is taken without it changes between versions.
    line.add(("--port",), str(settings.port), asked="port_server")
    line.add(("-c",), str(settings.context * settings.parallel), asked="context")
    line.add(("-np",), str(settings.parallel), asked="parallel")
    if rpc_addresses:
        line.add(("--rpc",), ",".join(rpc_addresses), asked="nodes")
    _add_placement(line, settings, has_rpc=bool(rpc_addresses))
    if settings.threads is not None:
        line.add(("-t",), str(settings.threads), asked="threads")
    if settings.ubatch_size is not None:
        line.add(("-ub",), str(settings.ubatch_size), asked="ubatch_size")
    if settings.alias is not None:
        line.add(("-a", "--alias"), settings.alias, asked="alias")
    if settings.api_key_file is not None:
        line.add(("--api-key-file",), str(settings.api_key_file), asked="api_key_file")
    # Saving a prompt for later ends a server with RPC: github.com/ggml-org/llama.cpp/issues/26529.
    # Versions without the flag save none.
    line.add_if_known(("--cache-ram",), str(settings.cache_ram))
    line.add_if_known(("--no-webui", "--no-ui"))
    line.add_if_known(("--offline",))
    line.add_if_known(("--metrics",))
    _check_more_words(settings.more_words)
    return [*line.words, *settings.more_words]


def _add_placement(line: _Line, settings: ServerSettings, *, has_rpc: bool) -> None:
    layers = settings.n_gpu_layers
    if layers is None and has_rpc:
        layers = str(max(MIN_GPU_LAYERS, settings.num_layers + 1))
    if layers is not None:
        line.add(("-ngl",), layers, asked="n_gpu_layers")
    if settings.tensor_split is not None:
        shares = ",".join(f"{share:g}" for share in settings.tensor_split)
        line.add(("-ts",), shares, asked="tensor_split")
    if settings.split_mode is not None:
        line.add(("-sm",), settings.split_mode, asked="split_mode")


class _Line:
    """Words, each flag checked against what the program's --help knows."""

    def __init__(self, program: ServerProgram) -> None:
        self._program = program
        self.words = [str(program.path)]

    def add(self, names: Sequence[str], value: str, *, asked: str) -> None:
        """A flag under one of its names, and its value."""
        if not self._add(names, value):
            raise UsageError(
                f"{asked} is set, and {self._program.path} ({self._program.version}) has no "
                f"{names[0]}: leave it out, or use another version of llama.cpp."
            )

    def add_if_known(self, names: Sequence[str], *values: str) -> None:
        """A flag that a version may do without."""
        self._add(names, *values)

    def _add(self, names: Sequence[str], *values: str) -> bool:
        known = next((name for name in names if name in self._program.flags), None)
        if known is not None:
            self.words += [known, *values]
        return known is not None


def _check_more_words(words: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0]
        if name in RESERVED:
            raise UsageError(f"server_args has {name}: {RESERVED[name]}; take it out.")
