"""The `worker` command: options, variables and comboio.toml become one `WorkerConfig`.

Answers `--help` and `--version`, and refuses a bad option, without importing torch; what holds
the stage is imported only once the config stands. Here, and nowhere else, errors are printed and
become exit codes.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Final, NoReturn

import click
from click.core import ParameterSource

from engine import lean_imports
from proto.adapter_name import split_adapters
from proto.address import Address
from proto.cores import cores_each
from proto.errors import Error, UsageError
from proto.keys import read_keys
from proto.quick_start import quick_start
from proto.settings import (
    Setting,
    find_settings,
    read_settings_file,
    settings_file,
)
from proto.tls import TlsFiles, tls_files
from worker import logs
from worker.config import (
    CACHE_BYTES,
    COMPRESSIONS,
    CUDA_GRAPHS,
    DEFAULT_HOST,
    DEFAULT_PORT,
    DTYPES,
    HEADS,
    KV_QUANTIZATIONS,
    LOG_FORMATS,
    LOG_LEVELS,
    QUANTIZATIONS,
    WorkerConfig,
    default_cache_dir,
    parse_adapters,
    parse_cache_dir,
    parse_cache_size,
    parse_kv_memory,
    parse_layers,
    parse_listen,
    parse_stage_to,
)

# What only makes sense typed by a person at the moment.
NOT_SETTINGS: Final = frozenset({"help", "version", "debug"})
# What transformers imports where it is, and no worker has a use for.
NOT_NEEDED: Final = ("accelerate", "PIL")


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A worker to run, and how it logs."""

    config: WorkerConfig
    log_level: str
    log_format: str


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command and leave: 0 done, 2 the caller's mistake, 1 anything else."""
    debug = "--debug" in (sys.argv[1:] if args is None else args)
    quick_start()
    try:
        sys.exit(_main(args))
    except Error as exc:
        _explain(str(exc), debug)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        _explain("interrupted", debug)
        sys.exit(130)
    except Exception as exc:
        hint = "" if debug else " Run it again with --debug for the traceback."
        _explain(f"internal error: {type(exc).__name__}: {_one_line(exc)}.{hint}", debug)
        sys.exit(1)


def _main(args: list[str] | None) -> int:
    invocation = _parse(args)
    if not isinstance(invocation, Invocation):  # --help or --version answered
        return invocation
    logs.set_up(invocation.log_level, invocation.log_format)
    lean_imports.allow(*NOT_NEEDED)
    from worker.server import run  # torch is imported later still, once the port is bound

    return run(invocation.config)


def _parse(args: list[str] | None) -> Invocation | int:
    settings: dict[str, Setting] = {}
    try:
        result: Invocation | int = worker.main(
            args, prog_name="worker", standalone_mode=False, obj=settings
        )
    except click.UsageError as exc:
        raise UsageError(_with_origin(exc, settings)) from exc
    return result


class _Command(click.Command):
    """Puts the environment and comboio.toml under the options, as click's default map."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        known = {str(p.name) for p in self.params} - NOT_SETTINGS
        found = extra["obj"]
        assert isinstance(found, dict)
        if not {"--help", "-h", "--version"} & set(args):
            file = read_settings_file(settings_file(os.environ))
            found |= find_settings("worker", known, file=file, environ=os.environ)
        extra["default_map"] = {key: _value(key, it.value) for key, it in found.items()}
        return super().make_context(info_name, args, parent, **extra)


def _value(key: str, value: object) -> object:
    """A setting as its option takes it: a text for one that may be repeated is split."""
    if key == "adapter" and isinstance(value, str):
        return split_adapters(value)
    return value


def _version() -> str:
    try:
        return metadata.version("comboio")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


@click.command(
    cls=_Command,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.option("--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: the demo model.")
@click.option("--sections", type=int, metavar="N", help="Cut the model into N sections.")
@click.option("--index", type=int, metavar="I", help="Hold section I, counted from 0.")
@click.option("--layers", metavar="A:B", help="Hold layers A to B-1 instead.")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help=f"Accept links here; port 0 picks a free one. Default: {DEFAULT_HOST}:{DEFAULT_PORT}+I.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:K]")
@click.option("--dtype", default="auto", show_default=True, metavar="|".join(DTYPES))
@click.option(
    "--quantize",
    default="none",
    show_default=True,
    metavar="|".join(QUANTIZATIONS),
    help="Round the weights of linear layers to so many bits, each as it is read.",
)
@click.option(
    "--quantize-head",
    default="auto",
    show_default=True,
    metavar="|".join(HEADS),
    help="The same for the lm_head: auto keeps it at int8.",
)
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    metavar="|".join(COMPRESSIONS),
    help="Hold weights of 16 bits in 12, the very same numbers: a quarter less memory. auto does "
    "so where it is faster, too (AVX-512 with bfloat16).",
)
@click.option(
    "--kv-quantize",
    default="none",
    show_default=True,
    metavar="|".join(KV_QUANTIZATIONS),
    help="Round keys and values to so many bits, each token's as it comes: --kv-memory then holds "
    "almost twice the tokens, or four times those of float32.",
)
@click.option(
    "--cuda-graphs",
    default="auto",
    show_default=True,
    metavar="|".join(CUDA_GRAPHS),
    help="On a GPU, record decode steps and play them again, where that computes the same.",
)
@click.option(
    "--cache-dir",
    metavar="DIR",
    help="Keep quantized weights here, so that the next start reads only them. "
    "Default: comboio/packed in the user's cache folder.",
)
@click.option(
    "--cache-size",
    metavar="SIZE",
    help=f"Keep at most so much there; what was not used for longest goes first. "
    f"Default: {CACHE_BYTES // 2**30}GiB, and never more than half of what is free on the disk.",
)
@click.option("--no-cache", is_flag=True, help="Keep no quantized weights, and read none kept.")
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="CPU threads for torch. Default: all cores, "
    "divided by the sections where --listen is on this machine.",
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="NAME=DIR",
    help="Serve this LoRA adapter as well, to requests that name it; may be repeated.",
)
@click.option(
    "--stage-to",
    metavar="DIR",
    help="Copy this section's bytes of the model, and no others, to DIR on a disk of this machine, "
    "and load from there: for a slow shared file system. A copy that is there is used again.",
)
@click.option(
    "--kv-memory",
    metavar="SIZE",
    help="Memory for keys and values, as 512MB or 1.5GiB. "
    "Default: 40 % of what is free once the weights are loaded, at most 8GiB "
    "(on a GPU: 70 %, no limit), divided by the sections where --listen is on this machine.",
)
@click.option(
    "--metrics-listen",
    metavar="HOST:PORT",
    help="Show this worker's figures to Prometheus at http://HOST:PORT/metrics.",
)
@click.option(
    "--secret-file",
    metavar="FILE",
    help="Let in only who knows this file's content. Needed to listen beyond this machine.",
)
@click.option(
    "--tls-cert",
    metavar="FILE",
    help="Encrypt links, and let in only who has a certificate of the same authority: "
    "this machine's certificate, PEM.",
)
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM, that only you can read.")
@click.option("--tls-ca", metavar="FILE", help="The authority's certificate, PEM.")
@click.option(
    "--insecure", is_flag=True, help="Listen beyond this machine without a secret or certificates."
)
@click.option(
    "--log-level", default="info", show_default=True, type=click.Choice(LOG_LEVELS, False)
)
@click.option(
    "--log-format", default="text", show_default=True, type=click.Choice(LOG_FORMATS, False)
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(_version(), prog_name="worker", message="%(prog)s (comboio) %(version)s")
@click.pass_context
def worker(
    context: click.Context,
    /,
    model: str | None,
    sections: int | None,
    index: int | None,
    layers: str | None,
    listen: str | None,
    device: str,
    dtype: str,
    quantize: str,
    quantize_head: str,
    compress: str,
    kv_quantize: str,
    cuda_graphs: str,
    cache_dir: str | None,
    cache_size: str | None,
    no_cache: bool,
    threads: int | None,
    adapter: tuple[str, ...],
    stage_to: str | None,
    kv_memory: str | None,
    metrics_listen: str | None,
    secret_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    insecure: bool,
    log_level: str,
    log_format: str,
    debug: bool,
) -> Invocation:
    """Hold a slice of a model's layers and compute the steps that managers send.

    Prints one line when it is ready:
    ready HOST:PORT section I/N layers A:B of L model NAME bytes B

    Every option but --debug can also stand in COMBOIO_<OPTION> or under [worker] in
    ./comboio.toml (COMBOIO_CONFIG names another file); an option on the command line wins.
    """
    if _is_typed(context, "layers"):  # what is typed overrides a setting of the other way
        sections, index = (
            sections if _is_typed(context, "sections") else None,
            index if _is_typed(context, "index") else None,
        )
    elif _is_typed(context, "sections") or _is_typed(context, "index"):
        layers = None
    if layers is None and sections is None and index is None:
        sections, index = 1, 0
    config = WorkerConfig(
        model=model,
        sections=sections,
        index=index,
        layers=None if layers is None else parse_layers(layers),
        listen=(
            Address(DEFAULT_HOST, DEFAULT_PORT + (index or 0))
            if listen is None
            else parse_listen(listen)
        ),
        device=device,
        dtype=dtype,
        quantize=quantize,
        quantize_head=quantize_head,
        compress=compress,
        kv_quantize=kv_quantize,
        cuda_graphs=cuda_graphs,
        cache_dir=_cache_dir(context, cache_dir, no_cache=no_cache),
        cache_bytes=CACHE_BYTES if cache_size is None else parse_cache_size(cache_size),
        threads=threads,
        adapters=parse_adapters(adapter),
        stage_to=None if stage_to is None else parse_stage_to(stage_to),
        kv_memory_bytes=None if kv_memory is None else parse_kv_memory(kv_memory),
        metrics_listen=(
            None if metrics_listen is None else parse_listen(metrics_listen, "--metrics-listen")
        ),
        keys=read_keys(secret_file, _tls_files(tls_cert, tls_key, tls_ca)),
        insecure=insecure,
    )
    return Invocation(
        config=with_threads(config, os.environ), log_level=log_level, log_format=log_format
    )


def _tls_files(*files: str | None) -> TlsFiles | None:
    return tls_files(*(None if file is None else Path(file) for file in files))


def _cache_dir(context: click.Context, said: str | None, *, no_cache: bool) -> Path | None:
    if no_cache:
        if _is_typed(context, "cache_dir"):
            raise UsageError("--cache-dir and --no-cache say opposite things: pass one of them.")
        return None
    return default_cache_dir(os.environ) if said is None else parse_cache_dir(said)


def with_threads(config: WorkerConfig, environ: Mapping[str, str]) -> WorkerConfig:
    """The same, with this worker's share of the cores where nobody has set a number."""
    if config.threads or config.workers_here == 1 or environ.get("OMP_NUM_THREADS"):
        return config
    return replace(config, threads=cores_each(config.workers_here))


def _is_typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _with_origin(error: click.UsageError, settings: dict[str, Setting]) -> str:
    """Click's sentence, with the place of the value where it is not the command line."""
    message = error.format_message().rstrip(".")
    name = str(error.param.name) if isinstance(error, click.BadParameter) and error.param else ""
    if error.ctx is None or name not in settings or _is_typed(error.ctx, name):
        return f"{message}."
    return f"{message} (from {settings[name].origin})."


def _explain(sentence: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"worker: {sentence}", file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
