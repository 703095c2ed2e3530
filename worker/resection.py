"""Hold other layers, because a manager has lost the worker that held them.

Knows when that may be and in which order it is done: whether it fits is reckoned before anything is
read, and what was held is let go first only where both do not fit at once. How a section becomes a
stage is `worker.server`'s, who uses it `worker.service`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from proto.errors import Error
from proto.messages import HoldSection, WorkerFacts
from worker.adapters import Adapters
from worker.compute import Compute
from worker.config import WorkerConfig
from worker.loading import Loading, LoadingAborted
from worker.logs import fields
from worker.memory import room_for_weights

if TYPE_CHECKING:
    from engine.stage import Stage

log = logging.getLogger("comboio.worker")

NOT_OVER_LINKS: Final = (
    "this worker listens to other machines without a secret (--insecure), so nobody may have it "
    "hold other layers over a link: start it with --secret-file"
)


@dataclass(frozen=True, slots=True)
class Held:
    """A stage with what a worker needs beside it to serve."""

    stage: Stage
    facts: WorkerFacts  # all blocks are free
    adapters: Adapters


class Resections:
    """The way from one section to another.

    Args:
        load: makes a stage of a section, and what goes with it; errors are sentences.
        why_closed: why nobody may ask for it over a link; None: managers may.
    """

    def __init__(
        self,
        config: WorkerConfig,
        compute: Compute,
        load: Callable[[tuple[int, int], Loading], Awaitable[Held]],
        *,
        why_closed: str | None,
    ) -> None:
        self._config, self._compute, self._load = config, compute, load
        self._why_closed = why_closed
        self.loading: Loading | None = None  # while it loads

    def room_bytes(self, stage: Stage) -> int:
        """Of weights, that could be held in the place of the stage's."""
        return room_for_weights(stage.device_name, self._config.kv_memory_bytes)

    def objection_to(self, asked: HoldSection, held: Held) -> str | None:
        """Why not, before anything is reckoned; None: it can be tried."""
        facts = held.facts
        if self._why_closed is not None:
            return self._why_closed
        if self.loading is not None:
            return f"it is loading other layers already ({self.loading.percent} %)"
        if asked.fingerprint != facts.fingerprint:
            return f"it holds another model, {facts.model} ({facts.fingerprint[:8]})"
        if not 0 <= asked.start_layer < asked.end_layer <= facts.num_layers:
            return (
                f"layers {asked.start_layer}:{asked.end_layer} are none of the model's "
                f"{facts.num_layers}"
            )
        return None

    async def change(self, asked: HoldSection, held: Held) -> Held:
        """Load what is asked for; nobody uses what is held meanwhile.

        Raises:
            StillHeld: it cannot be had; what it carries is held from here on.
            Error: nothing is held any more.
        """
        layers = (asked.start_layer, asked.end_layer)
        self.loading = Loading()
        try:
            return await self._change(layers, held, self.loading)
        finally:
            self.loading.close()
            self.loading = None

    async def _change(self, layers: tuple[int, int], held: Held, loading: Loading) -> Held:
        stage = held.stage
        try:
            needed_bytes = await self._compute.call(partial(_needed, self._config, stage, layers))
        except Exception as exc:  # foreign code reads the config
            raise StillHeld(held, in_words(exc)) from exc
        room_bytes = self.room_bytes(stage)
        if needed_bytes > room_bytes:
            raise StillHeld(
                held,
                f"layers {layers[0]}:{layers[1]} take {needed_bytes // 10**6} MB, and there is "
                f"room for {room_bytes // 10**6} MB",
            )
        fits_beside = needed_bytes <= room_bytes - stage.stage_bytes
        log.info(
            "loading other layers",
            extra=fields(layers=f"{layers[0]}:{layers[1]}", bytes=needed_bytes, beside=fits_beside),
        )
        if not fits_beside:
            try:
                await self._compute.call(stage.unload)
            except Error as exc:  # too much to do
                raise StillHeld(held, str(exc)) from exc
        try:
            return await self._load(layers, loading)
        except LoadingAborted:  # the worker is being stopped
            raise
        except Exception as exc:  # foreign code builds the model
            if fits_beside:
                raise StillHeld(held, in_words(exc)) from exc
            again = await self._load((stage.start_layer, stage.end_layer), Loading())
            raise StillHeld(again, in_words(exc)) from exc


class StillHeld(Error):
    """The other layers could not be had: the worker holds those that it held."""

    def __init__(self, held: Held, reason: str) -> None:
        self.held = held
        super().__init__(reason.rstrip("."))


def in_words(error: Exception) -> str:
    """Why layers could not be loaded, in one sentence."""
    if isinstance(error, Error):
        return str(error)
    text = " ".join(str(error).split())
    return f"the layers could not be loaded: {type(error).__name__}: {text}"


def _needed(config: WorkerConfig, stage: Stage, layers: tuple[int, int]) -> int:
    """Bytes of a section as this worker holds it: quantized where the present one is."""
    from engine.layer_bytes import measure_layers, section_bytes
    from engine.sections import Section

    sizes = measure_layers(config.model, config.dtype)
    present = section_bytes(sizes, Section(stage.start_layer, stage.end_layer))
    wanted = section_bytes(sizes, Section(*layers))
    return int(wanted * stage.stage_bytes / max(present, 1))
