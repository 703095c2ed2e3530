"""What `manager serve` was asked for, checked at the door. Opens no socket and no pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from manager.adapter_book import is_named, name_for
from manager.addresses import is_loopback
from manager.options import ConnectionConfig
from proto.adapter_name import is_adapter_name
from proto.address import Address
from proto.errors import UsageError
from proto.secret import read_secret_file
from proto.settings import parse_byte_size

MAX_BODY_BYTES: Final = "8MB"  # two million token ids, or a few novels
MAX_SEQUENCES: Final = 4096
MAX_TIMEOUT_S: Final = 7 * 24 * 3600.0
# Each costs some 30 microseconds: with so many, HTTP takes no more than 2 % of a core for them, and
# each of 64 readers still sees ten changes a second.
STREAM_EVENTS: Final = 640


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client cannot take from the others."""

    max_concurrent: int = 64  # sequences that run at the same time
    max_queue: int = 256  # sequences that wait behind them
    request_timeout_s: float = 600.0  # of one request, its time in the queue included
    drain_timeout_s: float = 30.0  # what runs may go on for so long after a signal
    max_body: str = MAX_BODY_BYTES

    def __post_init__(self) -> None:
        _check_whole("--max-concurrent", self.max_concurrent, 1)
        _check_whole("--max-queue", self.max_queue, 0)
        for name, value in (
            ("--request-timeout", self.request_timeout_s),
            ("--drain-timeout", self.drain_timeout_s),
        ):
            if not 0 < value <= MAX_TIMEOUT_S:
                raise UsageError(f"{name} {value:g}: seconds from above 0 to {MAX_TIMEOUT_S:g}.")
        self.body_bytes  # noqa: B018 - read once, so that a bad size shows here

    @property
    def body_bytes(self) -> int:
        """Most bytes of one request."""
        try:
            return parse_byte_size(self.max_body)
        except ValueError as exc:
            raise UsageError(f"--max-body: {exc}.") from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What `manager serve` was asked for."""

    connection: ConnectionConfig
    host: str = "127.0.0.1"
    port: int = 8000
    adapters: tuple[tuple[str, str], ...] = ()  # (the model's id in requests, what --adapter says)
    limits: Limits = field(default_factory=Limits)
    api_key_file: Path | None = None
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    stream_events: int = STREAM_EVENTS  # most a second, over all streams; 0: any number
    trace_dir: Path | None = None
    log_format: str = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: a port is a number from 0 to 65535.")
        if self.stream_events < 0:
            raise UsageError(
                f"--stream-events {self.stream_events}: a number from 0; 0 is an event for each "
                "token."
            )
        if not self.is_local and self.api_key_file is None and not self.insecure:
            raise UsageError(
                f"--host {self.host} lets anybody who reaches this machine use the model: pass "
                "--api-key-file FILE, or --insecure if the network is yours alone; to reach "
                "127.0.0.1 from elsewhere, `ssh -L 8000:127.0.0.1:8000 ...` needs neither."
            )
        if self.trace_dir is not None and self.trace_dir.exists() and not self.trace_dir.is_dir():
            raise UsageError(f"--trace-dir {self.trace_dir} is no folder.")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(Address(self.host, self.port))

    def api_keys(self) -> tuple[str, ...]:
        """The keys of --api-key-file, one a line; none: everybody may come in.

        Raises:
            UsageError: it is missing, readable by others, or holds no key.
        """
        if self.api_key_file is None:
            return ()
        try:
            text = read_secret_file(self.api_key_file).decode("ascii")
        except UnicodeDecodeError as exc:
            raise UsageError(
                f"--api-key-file {self.api_key_file}: a key is letters, digits and signs of ASCII."
            ) from exc
        return tuple(line.strip() for line in text.splitlines() if line.strip())


def named_adapters(wanted: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(model id, what --adapter says) of each.

    Raises:
        UsageError: two have the same id.
    """
    names: dict[str, str] = {}
    for said in wanted:
        name = said.partition("=")[0] if is_named(said) else said
        if not is_adapter_name(name):
            name = name_for(Path(said).expanduser().absolute())
        if names.setdefault(name, said) != said:
            raise UsageError(
                f"--adapter {said} and --adapter {names[name]} would both be the model {name}: "
                "give one another name, as in NAME=DIR."
            )
    return tuple(names.items())


def _check_whole(name: str, value: int, low: int) -> None:
    if not low <= value <= MAX_SEQUENCES:
        raise UsageError(f"{name} {value}: a number from {low} to {MAX_SEQUENCES}.")
