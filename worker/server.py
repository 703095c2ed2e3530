"""The life of a worker: bind the port, load the stage, serve, and leave in good order.

Knows the order of these and what can interrupt them. What links may ask stands in
`worker.service`; torch is imported on its own thread, after the port is bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from proto.address import Address, parse_address
from proto.errors import Error, WorkerLoading
from proto.framing import MAX_PAYLOAD_BYTES
from proto.free_memory import free_cpu_bytes
from proto.link import Link, Listener, connect, listen
from proto.messages import PROTOCOL_VERSION, Hello, Role, Welcome, WorkerFacts
from worker.adapters import NOT_OVER_LINKS, Adapters, check_adapter_files, load_adapters
from worker.compute import Compute
from worker.config import WorkerConfig, is_loopback
from worker.loading import Loading, LoadingAborted
from worker.logs import fields
from worker.memory import count_kv_blocks, is_out_of_memory
from worker.metrics import Reading, listen_for_metrics
from worker.resection import NOT_OVER_LINKS as NOT_OTHER_LAYERS
from worker.resection import Held, Resections

if TYPE_CHECKING:
    from engine.stage import Stage
    from worker.service import Service

log = logging.getLogger("comboio.worker")

# A prefill chunk beyond this gains nothing: the processor is busy long before. What the payload
# limit leaves for wide hidden states is less, with a quarter of it kept for block tables.
MAX_STEP_TOKENS: Final = 4096
# The step at hand is finished before leaving; Slurm gives 30 s between SIGTERM and SIGKILL.
LAST_STEP_S: Final = 20.0
# Loading is given up at its next tensor; importing torch cannot be interrupted.
ABORT_LOADING_S: Final = 1.0
# Python lets a thread that wants to run wait 5 ms for one that computes. The event loop has to
# send a finished step while torch's thread already works on the next one: let it wait less.
SWITCH_INTERVAL_S: Final = 0.0005


Load = Callable[[WorkerConfig, Loading], "Stage"]


def run(config: WorkerConfig, load: Load | None = None) -> int:
    """Hold one stage until somebody ends the process; returns the exit code.

    Args:
        load: what makes the stage, on torch's thread; `engine.stage_loading.load_stage` if None.
    Raises:
        Error: the port cannot be had, or the stage cannot be loaded.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        server = runner.run(_make_server(config, load or load_from_checkpoint))
        is_idle = runner.run(server.run())
    if not is_idle:  # torch's thread still computes or imports; the interpreter would stumble
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.Loop


async def _make_server(config: WorkerConfig, load: Load) -> Server:
    return Server(config, load)


class Server:
    """One worker process."""

    def __init__(self, config: WorkerConfig, load: Load) -> None:
        self._config, self._load = config, load
        self._loop = asyncio.get_running_loop()
        self._compute = Compute(self._loop)
        self._loading = Loading()
        self._service: Service | None = None  # None while loading
        self._stopped: asyncio.Future[str] = self._loop.create_future()  # the reason
        self._listen = str(config.listen)  # as it is bound, once it is
        self._metrics: asyncio.Server | None = None

    async def run(self) -> bool:
        """From start to end; True if torch's thread is idle at the end."""
        self._heed_signals()  # first: who reads that it listens may end it at once
        listener = await self._bind()
        try:
            await self._show_metrics()
            stage = await self._load_or_stop()
            if stage is not None:
                await self._serve(stage)
        finally:
            if self._metrics is not None:
                self._metrics.close()
            is_idle = await self._leave(listener)
        return is_idle

    # --- start -------------------------------------------------------------------------------

    async def _bind(self) -> Listener:
        config = self._config
        if not (is_loopback(config.listen.host) or config.keys):
            print(
                f"worker: warning: --insecure: whoever can reach {config.listen} can use this "
                "worker and read what its managers compute.",
                file=sys.stderr,
                flush=True,
            )
        listener = await listen(
            str(config.listen),
            welcome=self._welcome,
            on_link=self._on_link,
            on_refused=self._on_refused,
            secret=config.keys.secret,
            tls=config.keys.tls,
        )
        self._listen = listener.address
        log.info("listening", extra=fields(address=self._listen))
        return listener

    async def _show_metrics(self) -> None:
        wanted = self._config.metrics_listen
        if wanted is None:
            return
        if not is_loopback(wanted.host):
            print(
                f"worker: warning: --insecure: whoever can reach {wanted} can read this worker's "
                "figures.",
                file=sys.stderr,
                flush=True,
            )
        self._metrics, address = await listen_for_metrics(wanted, self._reading)
        log.info("metrics", extra=fields(address=address))

    def _reading(self) -> Reading:
        service = self._service
        if service is None:
            return Reading(self._listen, self._loading.percent, None)
        percent = None if service.loading is None else service.loading.percent
        facts = service.facts
        return Reading(name_for_people(facts), percent, (facts, service.status()))

    async def _load_or_stop(self) -> Stage | None:
        """The stage, or None when the worker was told to stop before it was there."""
        load = asyncio.ensure_future(
            self._compute.call(partial(self._load, self._config, self._loading))
        )
        either: set[asyncio.Future[Any]] = {load, self._stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._loading.close()
        if load.done():
            return load.result()
        self._loading.is_aborted = True
        load.add_done_callback(_ignore)
        return None

    async def _serve(self, stage: Stage) -> None:
        from worker.service import Service  # pulls in torch, which is here by now

        held = await self._equip(stage, self._config)
        self._service = Service(
            held,
            self._compute,
            self._connect_next,
            name_for_people(held.facts),
            Resections(
                self._config,
                self._compute,
                self._load_other,
                why_closed=why_closed(self._config, NOT_OTHER_LAYERS),
            ),
            self._nothing_held,
        )
        print(ready_line(held.facts), flush=True)
        await self._stopped

    async def _equip(self, stage: Stage, config: WorkerConfig) -> Held:
        """Adapters and KV blocks, and what Welcome says of all that."""
        say_how_weights_are_held(stage)
        loaded = await self._compute.call(partial(load_adapters, config.adapters, stage))
        total_blocks = await self._compute.call(
            partial(
                count_kv_blocks,
                config.kv_memory_bytes,
                stage.block_bytes,
                stage.device_name,
                self._config.workers_here,
            )
        )
        say_how_keys_are_held(stage, total_blocks)
        facts = make_facts(config, stage, self._listen, total_blocks)
        adapters = Adapters(stage, self._compute, why_closed=why_closed(config, NOT_OVER_LINKS))
        for adapter in loaded:
            adapters.share(adapter)
        return Held(stage, facts, adapters)

    async def _load_other(self, layers: tuple[int, int], loading: Loading) -> Held:
        config = replace(self._config, sections=None, index=None, layers=layers)
        stage = await self._compute.call(partial(self._load, config, loading))
        return await self._equip(stage, config)

    def _nothing_held(self, error: Error) -> None:
        if not self._stopped.done():
            self._stopped.set_exception(error)

    # --- end ---------------------------------------------------------------------------------

    def _heed_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError):  # not a Unix
                self._loop.add_signal_handler(number, self._stop, number)

    def _stop(self, number: signal.Signals) -> None:
        if self._stopped.done():  # asked twice: somebody is in a hurry
            os._exit(128 + number)
        log.info("stopping", extra=fields(signal=number.name))
        self._stopped.set_result(f"worker is shutting down ({number.name})")

    async def _leave(self, listener: Listener) -> bool:
        """Finish the step at hand, say goodbye, close; True if torch's thread is idle."""
        reason = "worker could not start"
        if self._stopped.done():
            error = self._stopped.exception()
            reason = self._stopped.result() if error is None else str(error)
        is_idle = True
        if self._service is not None:
            is_idle = await self._service.stop(ABORT_LOADING_S)
        is_idle &= await self._compute.stop(
            ABORT_LOADING_S if self._service is None else LAST_STEP_S
        )
        if self._service is not None:
            self._service.leave_chains(reason)
        await listener.close(reason)
        return is_idle

    # --- links -------------------------------------------------------------------------------

    def _welcome(self, hello: Hello) -> Welcome:
        if self._service is None:
            raise WorkerLoading(self._listen, self._loading.percent)
        if self._service.loading is not None:
            raise WorkerLoading(self._listen, self._service.loading.percent)
        if hello.role is Role.NEIGHBOUR:
            self._service.check_neighbour(hello.lease)
        return Welcome(version=PROTOCOL_VERSION, agent=_agent(), worker=self._service.facts)

    def _on_link(self, link: Link) -> None:
        assert self._service is not None, "nobody is welcome before"
        self._service.accept(link)

    def _on_refused(self, peer: str, error: Exception) -> None:
        log.info("link refused", extra=fields(peer=peer, reason=error))

    async def _connect_next(self, address: str, lease_id: bytes) -> Link:
        return await connect(
            address,
            role=Role.NEIGHBOUR,
            agent=_agent(),
            lease=lease_id,
            secret=self._config.keys.secret,
            tls=self._config.keys.tls,
        )


def load_from_checkpoint(config: WorkerConfig, loading: Loading) -> Stage:
    """The section that the options name, on torch's thread.

    Raises:
        Error: there is no such section, or it does not fit.
    """
    from engine.staging import Staging

    # Made before torch is imported: a folder that cannot be had is refused at once.
    staging = None if config.stage_to is None else Staging(config.stage_to, loading)
    from engine.packed_cache import PackedCache
    from engine.stage_loading import load_stage

    cache = None
    if config.cache_dir is not None:
        cache = PackedCache(config.cache_dir, config.cache_bytes)
    check_adapter_files(config.adapters)  # before gigabytes are read for nothing

    try:
        return load_stage(
            config.model,
            layers=config.layers,
            sections=config.sections,
            index=config.index,
            dtype=config.dtype,
            device=config.device,
            threads=config.threads,
            progress=loading.update,
            staging=staging,
            quantize=config.quantize,
            quantize_head=config.quantize_head,
            compress=config.compress,
            kv_quantize=config.kv_quantize,
            cache=cache,
            cuda_graphs=config.cuda_graphs == "auto",
        )
    except Error:
        raise
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        raise Error(
            f"the layers do not fit into memory: {free_cpu_bytes() // 10**6} MB were free when "
            f"loading stopped at {loading.percent} %. Hold fewer layers on this machine."
        ) from exc


def _ignore(load: asyncio.Future[Stage]) -> None:
    """Nobody waits for a stage that was given up."""
    if not load.cancelled():
        error = load.exception()
        if error is not None and not isinstance(error, LoadingAborted):
            log.debug("loading failed while it was given up", extra=fields(error=error))


def make_facts(config: WorkerConfig, stage: Stage, listen: str, total_blocks: int) -> WorkerFacts:
    """What this worker says of itself in Welcome."""
    itemsize = 4 if stage.dtype_name == "float32" else 2
    row_bytes = stage.hidden_size * itemsize + 4
    return WorkerFacts(
        listen=listen,
        host=socket.gethostname(),
        pid=os.getpid(),
        model=stage.model_name,
        model_path=_path_for_others(config.model),
        fingerprint=stage.fingerprint,
        section=config.index if config.layers is None else None,
        num_sections=config.sections if config.layers is None else None,
        start_layer=stage.start_layer,
        end_layer=stage.end_layer,
        num_layers=stage.num_layers,
        hidden_size=stage.hidden_size,
        vocab_size=stage.vocab_size,
        max_context=stage.max_context,
        dtype=stage.dtype_name,
        device=stage.device_name,
        stage_bytes=stage.stage_bytes,
        block_tokens=stage.block_tokens,
        block_bytes=stage.block_bytes,
        total_blocks=total_blocks,
        free_blocks=total_blocks,
        max_step_tokens=max(1, min(MAX_STEP_TOKENS, MAX_PAYLOAD_BYTES * 3 // 4 // row_bytes)),
        quantize=stage.quantize,
        kv_quantize=stage.kv_quantize,
    )


def say_how_weights_are_held(stage: Stage) -> None:
    """Log what multiplies, what is quantized, and what of the matrices is not."""
    from engine.kernels import native  # beside torch, which is here by now

    log.info(f"kernels: {native.description()}")
    packed = stage.packed
    if packed.packing is None:
        return
    if packed.packing.layers == "bf12":
        log.info(
            "weights of 16 bits are held in 12, exactly",
            extra=fields(mb=f"{packed.packed_bytes / 1e6:.1f}"),
        )
    if not packed.packing.is_lossy:
        return
    log.info(
        "quantized",
        extra=fields(
            layers=packed.packing.layers,
            head=packed.packing.head,
            mb=f"{packed.packed_bytes / 1e6:.1f}",
            kept_mb=f"{packed.fetched_bytes / 1e6:.1f}",
        ),
    )
    if packed.left_bytes:
        log.info(
            "matrices not quantized",
            extra=fields(mb=f"{packed.left_bytes / 1e6:.1f}", one=packed.left_example),
        )
    slow = packed.read_as_weights()
    if slow:
        log.warning(
            "the model reads packed weights in a way of its own, which is slow",
            extra=fields(modules=len(slow), one=slow[0]),
        )


def say_how_keys_are_held(stage: Stage, total_blocks: int) -> None:
    """Log what keys and values are, and for how many tokens there is room."""
    log.info(
        "keys and values",
        extra=fields(
            held=stage.dtype_name if stage.kv_quantize == "none" else stage.kv_quantize,
            bytes_a_token=stage.block_bytes // stage.block_tokens,
            tokens=total_blocks * stage.block_tokens,
        ),
    )


def why_closed(config: WorkerConfig, reason: str) -> str | None:
    """The reason, where nobody may change what is held over a link: who asks has shown nothing."""
    return None if config.keys or is_loopback(config.listen.host) else reason


def _path_for_others(model: str | None) -> str:
    """What a manager in another folder of this machine can open; a hub id stays as it is."""
    if model is None:
        return ""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def ready_line(facts: WorkerFacts) -> str:
    """What scripts wait for on stdout."""
    section = "-/-" if facts.section is None else f"{facts.section}/{facts.num_sections}"
    return (
        f"ready {facts.listen} section {section} "
        f"layers {facts.start_layer}:{facts.end_layer} of {facts.num_layers} "
        f"model {facts.model} bytes {facts.stage_bytes}"
    )


def name_for_people(facts: WorkerFacts) -> str:
    """HOST:PORT that tells machines apart: 0.0.0.0 is the same on all of them."""
    address = parse_address(facts.listen)
    if address.host in ("0.0.0.0", "::"):
        return str(Address(facts.host, address.port))
    return facts.listen


def _agent() -> str:
    try:
        return f"comboio/{metadata.version('comboio')}"
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "comboio/unknown"
