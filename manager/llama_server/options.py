"""The options of `manager llama-server run` and of its job: one for each configuration key.

Knows click and the names of keys; what a value must look like stands in
`manager.llama_server.config`, which is imported only when a command runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from proto.errors import UsageError

if TYPE_CHECKING:
    from manager.llama_server.config import LlamaServerConfig

Command = TypeVar("Command", bound=Callable[..., Any])

# key -> (what stands for its value in --help, help)
KEYS: Final[dict[str, tuple[str, str]]] = {
    "model": ("FILE.gguf", "The model. Of a split one, its first part."),
    "dir_llama_script": (
        "DIR",
        "Where llama-server and rpc-server lie. Default: $LLAMA_CPP_DIR, else PATH.",
    ),
    "prompt": ("TEXT", "Ask this."),
    "system": ("TEXT", "What the model is told before a prompt."),
    "prompt_dir": ("DIR", "Ask what user_prompt(.txt) in it says, after system_prompt(.txt)."),
    "prompts": ("FILE", "Ask all of these: .txt, a prompt a line, or .jsonl, as in manager batch."),
    "output": (
        "F.jsonl",
        "Where the results of --prompts go. Default: --result-file, else stdout.",
    ),
    "result_file": ("FILE", "Where the answer goes; FILE.timings.json beside it has the timings."),
    "metrics": ("F.json", "Write tokens/s and latencies."),
    "output_log": ("FILE", "Where llama-server and the rpc-servers log to."),
    "nodes": ("N", "llama-server on one, an rpc-server on each of the others. Default: 1."),
    "ntasks": ("N", "As --nodes, or left out."),
    "port_rpc": ("PORT", "Of the first rpc-server here, of each in a job. Default: a free one."),
    "port_server": ("PORT", "Of llama-server. Default: a free one."),
    "max_new_tokens": ("N", "Stop an answer after so many tokens. Default: 512."),
    "temperature": ("T", "0, the default, always takes the likeliest token."),
    "top_k": ("K", "Draw from the K likeliest."),
    "top_p": ("P", "Draw from the likeliest that together have probability P."),
    "min_p": ("P", "Draw from those at least P times as likely as the likeliest."),
    "repetition_penalty": ("R", "Above 1, tokens seen before become less likely."),
    "seed": ("S", "The same seed draws the same text. Default: random."),
    "request_timeout_s": ("S", "Give up after so many seconds without any sign. Default: 600."),
    "context": ("N", "Tokens of a prompt and its answer. Default: 8192, or what the model has."),
    "parallel": ("N", "How many prompts at once. Default: 1; 4 with --prompts or --keep."),
    "n_gpu_layers": ("N|auto|all", "Layers on GPUs and rpc-servers. Default: all of them."),
    "tensor_split": ("A,B,...", "The share of each rpc-server. Default: by its memory."),
    "split_mode": ("MODE", "How the model is cut: layer, row, tensor or none."),
    "ubatch_size": ("N", "Prompt tokens in one go; 64 keeps several rpc-servers busy at once."),
    "threads": ("N", "Of each process. Default: the cores of the machine, divided."),
    "cache_ram": ("MIB", "Memory for old prompts. Default: 0, as it ends llama-server with RPC."),
    "alias": ("NAME", "What the server calls its model."),
    "api_key_file": ("FILE", "The server asks for the key in it."),
    "load_timeout_s": ("S", "Give up when the model is not there by then. Default: 3600."),
    "server_args": ("WORDS", "More words for llama-server's command line."),
    "rpc_args": ("WORDS", "More words for the rpc-servers' command line."),
}
REPEATED: Final = {"stop": ("TEXT", "End an answer before this text; may be repeated.")}
FLAGS: Final = {
    "chat": "Whether a prompt is a message. Default: yes, but not the plain texts of --prompts.",
    "keep": "Leave the server up until ctrl-C, and print `ready URL` when it is.",
    "check_memory": "Whether to refuse a model that needs more memory than is free. Default: yes.",
}
# What only a job has a use for.
JOB_KEYS: Final[dict[str, tuple[str, str]]] = {
    "job_name": ("NAME", "Of the job. Default: llama-server."),
    "time": ("[D-]HH:MM:SS", "When Slurm ends the job; or a number of minutes."),
    "venv_dir": ("DIR", "The Python environment that the job activates."),
    "sbatch_script": ("FILE", "The batch script to submit. Default: ours."),
    "interface": ("NAME", "The network interface that the nodes talk over."),
}
# A checkpoint of Hugging Face is meant by COMBOIO_MODEL and comboio.toml, not a .gguf file.
NOT_FROM_SETTINGS: Final = {"model"}


class ConfigOption(click.Option):
    """A key of the configuration; `config_options` takes its value out of the command's."""

    @property
    def settings_table(self) -> str | None:
        """Set: COMBOIO_* and comboio.toml do not speak of it."""
        return "llama-server" if self.name in NOT_FROM_SETTINGS else None


def config_options(
    *, job: bool = False, leave_out: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Add --config and an option for each key; the command gets a `LlamaServerConfig` as `config`.

    Args:
        job: with the keys that only a job has a use for.
        leave_out: keys that the command has options of its own for; it may hand their values on
            in `ctx.meta["llama-server"]`, key -> value.
    """
    keys = {**KEYS, **(JOB_KEYS if job else {})}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_config(*args: Any, **found: Any) -> Any:
            names = [name for name in (*keys, *REPEATED, *FLAGS) if name not in leave_out]
            options = {name: found.pop(name) for name in names}
            config = _load(found.pop("config_file"), options)
            return command(*args, config=config, **found)

        wrapped: Any = with_config
        for option in reversed(_options(keys, leave_out)):
            wrapped = option(wrapped)
        return wrapped  # type: ignore[no-any-return]

    return decorate


def _options(
    keys: dict[str, tuple[str, str]], leave_out: Collection[str]
) -> list[Callable[[Any], Any]]:
    # Not "config": COMBOIO_CONFIG names another file, comboio.toml.
    options = [
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Read keys from this .json or .toml file; options win.",
        )
    ]
    for name, (metavar, text) in keys.items():
        if name not in leave_out:
            options.append(
                click.option(_dashed(name), metavar=metavar, help=text, cls=ConfigOption)
            )
    for name, (metavar, text) in REPEATED.items():
        if name not in leave_out:
            options.append(
                click.option(
                    _dashed(name), multiple=True, metavar=metavar, help=text, cls=ConfigOption
                )
            )
    for name, text in FLAGS.items():
        if name not in leave_out:
            both = f"{_dashed(name)}/--no-{name.replace('_', '-')}"
            options.append(click.option(both, default=None, help=text, cls=ConfigOption))
    return options


def _load(path: Path | None, options: dict[str, Any]) -> LlamaServerConfig:
    try:
        from manager.llama_server.config import load_config
    except ImportError as exc:
        raise UsageError(
            "reading what llama-server is told needs the pydantic package, which cannot be "
            f"imported ({exc}): run `pip install pydantic`."
        ) from exc
    context = click.get_current_context()
    origins: dict[str, str] = context.find_root().meta.get("origins", {})
    typed: dict[str, object] = {}
    settings: dict[str, tuple[object, str]] = {}
    for name, value in options.items():
        source = context.get_parameter_source(name)
        if source is ParameterSource.COMMANDLINE:
            typed[name] = value
        elif source is ParameterSource.DEFAULT_MAP:
            settings[name] = (value, origins.get(name, name))
    typed.update(context.meta.get("llama-server", {}))
    return load_config(path, typed, settings=settings)


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"
