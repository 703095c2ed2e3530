"""What a worker is told at start, checked before anything heavy is imported.

Knows the rules between options (sections and layers exclude each other, an open port needs a
secret) and how their values are written. Knows no click, reads no file and no environment:
`worker.cli` fills a `WorkerConfig` from them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proto.adapter_name import parse_adapter
from proto.address import Address, parse_address
from proto.errors import UsageError
from proto.keys import NO_KEYS, Keys
from proto.messages import MAX_ADAPTERS
from proto.settings import parse_byte_size

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7710  # of index 0; index I listens on 7710 + I
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS: Final = ("none", "int8", "int4")
KV_QUANTIZATIONS: Final = ("none", "int8")
HEADS: Final = ("auto", "int8", "same")
COMPRESSIONS: Final = ("auto", "on", "off")
CUDA_GRAPHS: Final = ("auto", "off")
CACHE_BYTES: Final = 20 * 2**30
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
LOG_FORMATS: Final = ("text", "json")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Everything a worker is told at start; below `worker.cli` nothing reads the environment."""

    listen: Address  # port 0 picks a free one
    model: str | None = None  # folder or hub id; None: the demo model
    sections: int | None = 1
    index: int | None = 0
    layers: tuple[int, int] | None = None  # instead of sections and index
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    quantize_head: str = "auto"
    kv_quantize: str = "none"
    compress: str = "auto"  # 16 bits in 12, exactly
    cuda_graphs: str = "auto"  # "off": never
    cache_dir: Path | None = None  # for packed weights; None: keep none
    cache_bytes: int = CACHE_BYTES
    threads: int | None = None  # None: torch's own choice
    adapters: tuple[tuple[str, str], ...] = ()  # (name, folder)
    stage_to: Path | None = None  # folder that the section's bytes are copied to first
    kv_memory_bytes: int | None = None  # None: a share of what is free
    metrics_listen: Address | None = None  # None: nothing for Prometheus
    keys: Keys = NO_KEYS
    insecure: bool = False

    def __post_init__(self) -> None:
        self._check_slice()
        self._check_adapters()
        self._check_device()
        _check_choice("--dtype", self.dtype, DTYPES)
        _check_choice("--quantize", self.quantize, QUANTIZATIONS)
        _check_choice("--quantize-head", self.quantize_head, HEADS)
        if self.quantize_head != "auto" and self.quantize == "none":
            raise UsageError(
                f"--quantize-head {self.quantize_head} means nothing where no weights are "
                "quantized: pass --quantize int8 or int4 as well."
            )
        _check_choice("--compress", self.compress, COMPRESSIONS)
        _check_choice("--kv-quantize", self.kv_quantize, KV_QUANTIZATIONS)
        _check_choice("--cuda-graphs", self.cuda_graphs, CUDA_GRAPHS)
        if self.cache_bytes < 1:
            raise UsageError("--cache-size 0 keeps nothing: pass --no-cache instead.")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: at least 1 thread must compute.")
        if self.kv_memory_bytes is not None and self.kv_memory_bytes < 1:
            raise UsageError("--kv-memory 0 holds no sequence: give it at least some megabytes.")
        if not (is_loopback(self.listen.host) or self.keys or self.insecure):
            raise UsageError(
                f"--listen {self.listen} lets other machines in and there is no secret: pass "
                "--secret-file FILE (the same file to the manager and every worker), or "
                "certificates (--tls-cert, --tls-key, --tls-ca), or --insecure "
                "where every machine that can reach this port is yours."
            )

        metrics = self.metrics_listen
        if metrics is not None and not (is_loopback(metrics.host) or self.insecure):
            raise UsageError(
                f"--metrics-listen {metrics} lets every machine that can reach it read this "
                "worker's figures, which no secret protects: listen on 127.0.0.1, or pass "
                "--insecure where they may."
            )

    @property
    def workers_here(self) -> int:
        """How many workers of the chain share this machine, as far as the options tell.

        A chain of which one worker cannot be reached from elsewhere is on this machine as a whole.
        """
        return (self.sections or 1) if is_loopback(self.listen.host) else 1

    def _check_slice(self) -> None:
        if self.layers is not None:
            if self.sections is not None or self.index is not None:
                raise UsageError("give either --layers A:B, or --sections N with --index I.")
            start, end = self.layers
            if not 0 <= start < end:
                raise UsageError(f"--layers {start}:{end} holds no layer: write A:B with A < B.")
            return
        if self.sections is None or self.index is None:
            missing, given = (
                ("--sections N", f"--index {self.index}")
                if self.sections is None
                else ("--index I", f"--sections {self.sections}")
            )
            raise UsageError(f"{given} needs {missing} beside it.")
        if self.sections < 1:
            raise UsageError(f"--sections {self.sections}: a model has at least 1 section.")
        if not 0 <= self.index < self.sections:
            raise UsageError(
                f"--index {self.index} is out of range for --sections {self.sections}: "
                f"it must be 0 to {self.sections - 1}."
            )

    def _check_adapters(self) -> None:
        names = [name for name, _ in self.adapters]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"--adapter {twice} is given twice: two adapters need two names.")
        if len(names) > MAX_ADAPTERS:
            raise UsageError(
                f"--adapter is given {len(names)} times: a worker holds at most {MAX_ADAPTERS}."
            )

    def _check_device(self) -> None:
        kind, _, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (
            ":" in self.device and (kind != "cuda" or not number.isdigit())
        ):
            raise UsageError(f"--device {self.device}: it must be auto, cpu, cuda or cuda:K.")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: it must be one of {', '.join(choices)}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it; of names, only `localhost` counts."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_listen(text: str, option: str = "--listen") -> Address:
    """Read HOST:PORT or [IPV6]:PORT, where to listen."""
    try:
        return parse_address(text)
    except UsageError as exc:
        raise UsageError(f"{option}: {exc}") from exc


def parse_layers(text: str) -> tuple[int, int]:
    """Read "A:B", a half-open range of layers."""
    start, colon, end = text.partition(":")
    if not colon or not (start.strip().isdecimal() and end.strip().isdecimal()):
        raise UsageError(f"--layers {text!r} is not A:B, a half-open range of layers as in 0:12.")
    return int(start), int(end)


def parse_adapters(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read the NAME=DIR of every --adapter."""
    try:
        return tuple(map(parse_adapter, texts))
    except UsageError as exc:
        raise UsageError(f"--adapter: {exc}") from exc


def parse_stage_to(text: str) -> Path:
    """Read the DIR of --stage-to."""
    if not text.strip():
        raise UsageError("--stage-to '' names no folder: give one on a disk of this machine.")
    return Path(text).expanduser()


def parse_cache_dir(text: str) -> Path:
    """Read the DIR of --cache-dir."""
    if not text.strip():
        raise UsageError("--cache-dir '' names no folder: name one, or pass --no-cache.")
    return Path(text).expanduser()


def default_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where packed weights are kept when nobody said: with the user's other caches."""
    said = environ.get("XDG_CACHE_HOME", "")
    # The specification has a relative path ignored.
    caches = Path(said) if said.startswith("/") else Path("~/.cache").expanduser()
    return caches / "comboio" / "packed"


def parse_cache_size(text: str) -> int:
    """Read the SIZE of --cache-size."""
    try:
        return parse_byte_size(text)
    except ValueError as exc:
        raise UsageError(f"--cache-size {exc}.") from exc


def parse_kv_memory(text: str) -> int:
    """Read the SIZE of --kv-memory."""
    try:
        return parse_byte_size(text)
    except ValueError as exc:
        raise UsageError(f"--kv-memory {exc}.") from exc
