"""What `manager bench` can be told, and what of that is refused. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from manager.options import LLAMA_SERVER, ConnectionConfig, connection_options
from proto.errors import UsageError

if TYPE_CHECKING:
    from manager.bench_rounds import Case

Command = TypeVar("Command", bound=Callable[..., Any])

MAX_STREAMS: Final = 4096
TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"
NAMES: Final = (TRANSFORMERS, LLAMA_CPP)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What `manager bench` was asked for."""

    connection: ConnectionConfig
    streams: tuple[int, ...] = (1, 2, 4, 8)
    prompt_tokens: int = 39
    new_tokens: int = 64
    rounds: int = 3
    json_file: Path | None = None
    charts: Path | None = None
    against: tuple[str, ...] = ()  # of NAMES, or a llama-server's URL
    gguf: Path | None = None  # what llama.cpp runs

    def __post_init__(self) -> None:
        for option, path in (("--json", self.json_file), ("--charts", self.charts)):
            if path is not None and not path.absolute().parent.is_dir():
                raise UsageError(f"{option} {path}: there is no folder {path.parent}.")
        if self.json_file is not None and self.json_file.is_dir():
            raise UsageError(f"--json {self.json_file} is a folder: name a file.")
        if self.connection.trace is not None:
            raise UsageError(
                "--trace would be measured along with the rest: use it with `manager batch`."
            )
        self._check_against()

    @property
    def cases(self) -> list[Case]:
        """A case for every number of streams."""
        from manager.bench_rounds import Case

        return [
            Case(
                f"{count} stream{'s' if count > 1 else ''}",
                count,
                self.prompt_tokens,
                self.new_tokens,
            )
            for count in self.streams
        ]

    @property
    def words(self) -> str:
        """For the table's title."""
        return (
            f"prompts of {self.prompt_tokens} tokens, {self.new_tokens} new ones, "
            f"{f'medians of {self.rounds} rounds' if self.rounds > 1 else 'one round'}"
        )

    def as_json(self) -> dict[str, Any]:
        """What the figures depend on."""
        return {
            "streams": self.streams,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
            "against": self.against,
            "quantize": self.connection.quantize if self.connection.spawn else None,
            "kv_quantize": self.connection.kv_quantize if self.connection.spawn else None,
        }

    def _check_against(self) -> None:
        if self.against and self.connection.backend == LLAMA_SERVER:
            raise UsageError(
                "--against compares our pipeline with others, and --server measures a "
                "llama-server alone: with --against, name it there: --against URL."
            )
        if LLAMA_CPP in self.against and self.gguf is None:
            raise UsageError(
                "--against llama.cpp needs the model as llama.cpp reads it: pass --gguf FILE, or "
                "the URL of a llama-server that is up instead of llama.cpp."
            )
        if self.gguf is not None and LLAMA_CPP not in self.against:
            raise UsageError("--gguf is what llama.cpp runs: pass --against llama.cpp as well.")


def bench_options(command: Command) -> Command:
    """Add the options of `BenchConfig`; the command gets it as `config`."""

    @wraps(command)
    def with_config(**values: Any) -> Any:
        values["streams"] = parse_streams(values["streams"])
        values["against"] = parse_against(values["against"])
        return command(config=BenchConfig(**values))

    wrapped: Any = connection_options(with_config)
    for option in reversed(OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


OPTIONS: Final = (
    click.option(
        "--streams",
        default="1,2,4,8",
        show_default=True,
        metavar="N,...",
        help="How many requests run at once, each number in its turn.",
    ),
    click.option(
        "--prompt-tokens",
        type=click.IntRange(min=1),
        default=39,
        show_default=True,
        metavar="N",
        help="Length of every prompt.",
    ),
    click.option(
        "--new-tokens",
        type=click.IntRange(min=2),
        default=64,
        show_default=True,
        metavar="N",
        help="Every stream generates exactly so many; end tokens do not end it.",
    ),
    click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        metavar="N",
        help="Measure everything so often, after a round that warms up; medians are shown.",
    ),
    click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write all figures there as well.",
    ),
    click.option(
        "--charts",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Draw PNG charts there: tokens/s, latency, busy share, when steps ran.",
    ),
    click.option(
        "--against",
        default="",
        metavar="NAME,...",
        help="Let others take turns on this machine: transformers, llama.cpp (with --gguf), or "
        "the URL of a llama-server that is up.",
    ),
    click.option(
        "--gguf",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The same model for --against llama.cpp.",
    ),
)


def parse_streams(text: str) -> tuple[int, ...]:
    """Read "1,2,4,8".

    Raises:
        UsageError: it is not.
    """
    words = [it.strip() for it in str(text).split(",")]
    if not all(it.isdecimal() and 1 <= int(it) <= MAX_STREAMS for it in words):
        raise UsageError(
            f"--streams {text}: it takes numbers from 1 to {MAX_STREAMS}, with commas, as in 1,8."
        )
    return tuple(sorted({int(it) for it in words}))


def parse_against(text: str) -> tuple[str, ...]:
    """Read "transformers,http://10.0.0.5:8080".

    Raises:
        UsageError: there is a name in it that means nothing.
    """
    names = [it.strip() for it in text.split(",") if it.strip()]
    for name in names:
        if name not in NAMES and not name.startswith("http://"):
            raise UsageError(
                f"--against {name}: it takes {', '.join(NAMES)}, or http://HOST:PORT of a "
                "llama-server."
            )
    return tuple(dict.fromkeys(names))
