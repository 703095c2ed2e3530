"""What a run of llama-server is told: read from JSON or TOML and from options, and checked.

The keys are those of the `config.json` that people have from the scripts before, and ours beside
them. A relative path of a file is relative to that file. Every mistake is one sentence that names
the key, and where it stands. Imports pydantic: load this module only where a configuration is read.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from manager.generation import MAX_SCALE, MAX_SEED, GenerationOptions
from manager.llama_server import values
from proto.errors import RequestRefused, UsageError

TABLE: Final = "llama-server"  # of a TOML file; its keys may stand at the top as well
SHOWN_CHARS: Final = 60  # of a value, in a sentence

Text = Annotated[str, BeforeValidator(values.text)]
Flag = Annotated[bool, BeforeValidator(values.flag)]
Port = Annotated[int, BeforeValidator(values.port)]
Words = Annotated[tuple[str, ...], BeforeValidator(values.words)]
Number = Annotated[float, BeforeValidator(values.number(0, MAX_SCALE))]
Count = Annotated[int, BeforeValidator(values.whole(1, 2**31 - 1))]

DEFAULT_PORT_RPC: Final = 50052
DEFAULT_PORT_SERVER: Final = 8080
# A hundred gigabytes through a link of 1 Gbit/s take a quarter of an hour.
DEFAULT_LOAD_TIMEOUT_S: Final = 3600.0


class LlamaServerConfig(BaseModel):
    """Everything that `manager llama-server run` and its job are told. Paths are absolute."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # As in the config.json of before.
    job_name: Text = "llama-server"
    output_log: Path | None = None  # where the job, and the processes of a run here, write
    result_file: Path | None = None  # where the answer goes; its timings lie beside it
    dir_llama_script: Path | None = None  # folder of llama-server and rpc-server
    model: Path
    port_rpc: Port | None = None
    port_server: Port | None = None
    venv_dir: Path | None = None
    prompt_dir: Path | None = None  # has user_prompt(.txt), may have system_prompt(.txt)
    nodes: Annotated[int, BeforeValidator(values.whole(1, 100_000, "a number of nodes"))] = 1
    ntasks: Annotated[int, BeforeValidator(values.whole(1, 100_000))] | None = None
    time: Annotated[str, BeforeValidator(values.time_limit)] | None = None
    sbatch_script: Path | None = None

    # What is asked.
    prompt: Text | None = None
    system: Text | None = None  # with `prompt`, or for plain texts of `prompts`
    prompts: Path | None = None
    output: Path | None = None  # the results of `prompts`
    metrics: Path | None = None
    chat: Flag | None = None  # None: a prompt is a message, texts of `prompts` are not
    max_new_tokens: Count = 512
    temperature: Number = 0.0
    top_k: Annotated[int, BeforeValidator(values.whole(0, 2**31 - 1))] = 0
    top_p: Number = 1.0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    seed: Annotated[int, BeforeValidator(values.whole(0, MAX_SEED))] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(values.texts)] = ()
    request_timeout_s: Annotated[float, BeforeValidator(values.number(1, 1e7))] = 600.0

    # How llama-server runs.
    context: Count | None = None  # tokens of a prompt and its answer; None: 8192, or the model's
    parallel: Annotated[int, BeforeValidator(values.whole(1, 256))] | None = None
    n_gpu_layers: Annotated[str, BeforeValidator(values.layers)] | None = None
    tensor_split: Annotated[tuple[float, ...], BeforeValidator(values.shares)] | None = None
    split_mode: (
        Annotated[str, BeforeValidator(values.one_of("none", "layer", "row", "tensor"))] | None
    ) = None
    ubatch_size: Count | None = None
    threads: Annotated[int, BeforeValidator(values.whole(1, 4096))] | None = None
    cache_ram: Annotated[int, BeforeValidator(values.whole(-1, 2**31 - 1, "MiB"))] = 0
    alias: Text | None = None
    api_key_file: Path | None = None
    interface: Text | None = None  # of a job: the network that its nodes talk over
    server_args: Words = ()
    rpc_args: Words = ()
    load_timeout_s: Annotated[float, BeforeValidator(values.number(1, 1e7))] = (
        DEFAULT_LOAD_TIMEOUT_S
    )
    check_memory: Flag = True
    keep: Flag = False

    @model_validator(mode="after")
    def _check_together(self) -> LlamaServerConfig:
        if self.ntasks not in (None, self.nodes):
            raise ValueError(
                f"ntasks is {self.ntasks} and nodes is {self.nodes}: every node runs one task, "
                f"llama-server on the first and an rpc-server on each of the others. "
                f"Leave ntasks out, or set it to {self.nodes}"
            )
        sources = [key for key in PROMPT_KEYS if getattr(self, key) is not None]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} both say what to ask: keep one of them")
        if self.output is not None and self.prompts is None:
            raise ValueError(
                "output is for the results of prompts, and there are none: "
                "the answer to a single prompt goes to result_file"
            )
        return self

    @property
    def options(self) -> GenerationOptions:
        """How answers are generated."""
        return GenerationOptions(**{key: getattr(self, key) for key in GENERATION_KEYS})


PATH_KEYS: Final = (
    "output_log",
    "result_file",
    "dir_llama_script",
    "model",
    "venv_dir",
    "prompt_dir",
    "sbatch_script",
    "prompts",
    "output",
    "metrics",
    "api_key_file",
)
PROMPT_KEYS: Final = ("prompt", "prompt_dir", "prompts")
GENERATION_KEYS: Final = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
)


@dataclass(frozen=True, slots=True)
class Given:
    """One value before it is checked, and where it was found."""

    value: object
    origin: str  # as a sentence begins: "port_rpc in /a/config.json", "--port-rpc"
    folder: Path  # what a relative path is relative to


def load_config(
    path: Path | None,
    options: Mapping[str, object],
    *,
    settings: Mapping[str, tuple[object, str]] | None = None,
) -> LlamaServerConfig:
    """Merge a file with options, which win, and check all of it.

    Args:
        path: .json or .toml, with the keys at its top, or in TOML under [llama-server].
        options: key -> value, of those that were typed.
        settings: key -> (value, where it was found); the file wins over these.
    Raises:
        UsageError: in one sentence, with the key and where it stands.
    """
    here = Path.cwd()
    given = {
        key: Given(value, origin, here)
        for key, (value, origin) in (settings or {}).items()
        if value is not None
    }
    if path is not None:
        given = _over(given, read_file(path))
    typed = {
        key: Given(value, f"--{key.replace('_', '-')}", here)
        for key, value in options.items()
        if value is not None
    }
    return _checked(_over(given, typed), path)


def read_file(path: Path) -> dict[str, Given]:
    """The keys of a file; null and "" count as not set, as people blank what they do not use.

    Raises:
        UsageError: there is no such file, or it is not JSON or TOML, or not a table of keys.
    """
    if path.suffix.lower() not in (".json", ".toml"):
        raise UsageError(f"--config {path}: its name must end in .json or .toml.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"--config {path}: there is no such file.") from None
    except IsADirectoryError:
        raise UsageError(f"--config {path} is a folder: name a .json or .toml file.") from None
    except OSError as exc:
        raise UsageError(f"--config {path} cannot be read: {exc.strerror}.") from exc
    try:
        written = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UsageError(
            f"--config {path} is not UTF-8 (byte {exc.start}): save it as UTF-8."
        ) from None
    read = _read_json if path.suffix.lower() == ".json" else _read_toml
    folder = Path(os.path.abspath(path)).parent
    found: dict[str, Given] = {}
    for spelled, value in read(path, written).items():
        key = spelled.replace("-", "_")
        if key in found:
            raise UsageError(f"{path} sets {key!r} twice, with _ and with -: remove one of them.")
        if value is not None and value != "":
            found[key] = Given(value, f"{spelled} in {path}", folder)
    return found


def _read_json(path: Path, written: str) -> dict[str, object]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UsageError(f"{path} sets {twice!r} twice: remove one of them.")
        return found

    try:
        content = json.loads(written, object_pairs_hook=once)
    except json.JSONDecodeError as exc:
        raise UsageError(
            f"{path} is not valid JSON: line {exc.lineno}, column {exc.colno}: {exc.msg}."
        ) from None
    except RecursionError:
        raise UsageError(f"{path} is not a table of keys: it nests too deeply.") from None
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} must be one JSON object, {{...}} with keys; it is {_shown(content)}."
        )
    return content


def _read_toml(path: Path, written: str) -> dict[str, object]:
    try:
        content = tomllib.loads(written)
    except tomllib.TOMLDecodeError as exc:
        raise UsageError(f"{path} is not valid TOML: {exc}.") from None
    table = content.get(TABLE)
    if table is None:
        return content
    if not isinstance(table, dict):
        raise UsageError(f"{TABLE} in {path} is {_shown(table)}: it is a table, [{TABLE}].")
    # Other tables belong to other programs, keys above the first table to nobody.
    loose = next((key for key, value in content.items() if not isinstance(value, dict)), None)
    if loose is not None:
        raise UsageError(f"{loose} in {path} stands outside of [{TABLE}]: put it below.")
    return table


def _over(below: dict[str, Given], above: dict[str, Given]) -> dict[str, Given]:
    """What is above wins; what to ask is said in several ways, and one replaces the others."""
    if any(key in above for key in PROMPT_KEYS):
        below = {key: given for key, given in below.items() if key not in PROMPT_KEYS}
        if "prompts" not in above:
            below.pop("output", None)
    return {**below, **above}


def _checked(given: Mapping[str, Given], path: Path | None) -> LlamaServerConfig:
    try:
        config = LlamaServerConfig(
            **{
                key: _path(it) if key in PATH_KEYS else it.value  # type: ignore[arg-type]
                for key, it in given.items()
            }
        )
    except ValidationError as exc:
        raise UsageError(_sentence(exc, given, path)) from None
    try:
        _ = config.options
    except RequestRefused as exc:
        key = str(exc).partition(" ")[0]
        where = f"{given[key].origin}: " if key in given else ""
        raise UsageError(f"{where}{exc}") from None
    return config


def _path(given: Given) -> object:
    """An absolute path, `~` and variables filled in; what is no path stays, to be refused."""
    if not isinstance(given.value, (str, os.PathLike)):
        return given.value
    written = os.path.expandvars(os.path.expanduser(os.fspath(given.value)))
    unset = re.search(r"\$(?:\w+|\{\w+\})", str(written))
    if unset:
        raise UsageError(
            f"{given.origin} is {_shown(given.value)}: {unset[0]} is not set in the environment."
        )
    return Path(os.path.normpath(given.folder / str(written)))


def _sentence(exc: ValidationError, given: Mapping[str, Given], path: Path | None) -> str:
    """The first mistake; how many others there are."""
    mistakes = exc.errors(include_url=False, include_input=False)
    more = len(mistakes) - 1
    others = f" ({more} more mistake{'s' * (more > 1)} beside this one.)" if more else ""
    return _mistake(mistakes[0], given, path) + others


def _mistake(mistake: ErrorDetails, given: Mapping[str, Given], path: Path | None) -> str:
    where = "" if path is None else f" in {path}"
    key = str(mistake["loc"][0]) if mistake["loc"] else None
    reason = mistake.get("ctx", {}).get("error")
    if key is None:
        return f"{path}: {reason}." if path is not None else f"{reason}."
    if mistake["type"] == "missing":
        what = "the .gguf file to run" if key == "model" else "a key that must be there"
        return f"{key} is missing{where}: set it to {what}, or pass --{key.replace('_', '-')}."
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {key!r}{where}: {_hint(key)}"
    if reason is None:  # pydantic's own check, of a path or of a plain number
        wanted = "path" if key in PATH_KEYS else "number"
        reason = f"it takes a {wanted}"
    return f"{given[key].origin} is {_shown(given[key].value)}: {reason}."


def _hint(key: str) -> str:
    near = get_close_matches(key.lower().replace("-", "_"), LlamaServerConfig.model_fields, n=1)
    known = ", ".join(LlamaServerConfig.model_fields)
    return f"did you mean {near[0]!r}?" if near else f"known are {known}."


def _shown(value: Any) -> str:
    said = json.dumps(value, ensure_ascii=False, default=str)
    return said if len(said) <= SHOWN_CHARS else f"{said[: SHOWN_CHARS - 3]}..."
