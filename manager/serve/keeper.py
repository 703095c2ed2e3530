"""Keep a pipeline open: ready only after a real token went through every stage, and again after a
loss.

Owns the pipeline's life, and the reason why there is none. Knows no HTTP and no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from enum import Enum
from typing import TYPE_CHECKING, Final

from manager.connection import open_pipeline
from manager.encoding import Prompt
from manager.generation import GenerationOptions
from manager.options import ConnectionConfig
from manager.output import Notices
from manager.serve.config import ServeConfig
from manager.serve.errors import ApiError, not_ready
from manager.serve.log import Log
from proto.errors import Error

if TYPE_CHECKING:
    from manager.dispatcher import Trace
    from manager.pipeline import Pipeline

LOOK_EVERY_S: Final = 0.2
RETRY_FIRST_S: Final = 0.5
RETRY_MOST_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 120.0  # a small board's first step reads its weights from an SD card

PROBE: Final = GenerationOptions(max_new_tokens=1, ignore_eos=True)


Connect = Callable[[], Awaitable[ConnectionConfig]]


class State(Enum):
    """What the server can do now."""

    LOADING = "loading"  # the pipeline is not open yet
    READY = "ready"
    LOST = "lost"  # a worker went away; its place is being taken, or the pipeline opened again
    DRAINING = "draining"  # a signal came: what runs is finished


class Keeper:
    """The one pipeline of a server."""

    def __init__(
        self,
        config: ServeConfig,
        log: Log,
        trace: Trace | None,
        connect: Connect | None = None,
    ) -> None:
        """`connect` says where the workers are, before each opening; None: where they were."""
        self._config, self._log, self._trace = config, log, trace
        self._connect = connect
        self._pipeline: Pipeline | None = None
        self._state, self._reason = State.LOADING, "the workers are being looked at"
        self._is_draining = False
        self.losses = 0
        self.last_loss: Error | None = None
        self.opened = asyncio.Event()  # for the first time
        self.adapters: dict[str, str] = {}  # model id -> what the pipeline calls it

    @property
    def state(self) -> State:
        """Now: a pipeline may be lost before anybody noticed."""
        if self._is_draining:
            return State.DRAINING
        if self._state is State.READY and self._loss is not None:
            return State.LOST
        return self._state

    @property
    def reason(self) -> str | None:
        """Why nothing can be generated now; None where it can."""
        if self._is_draining:
            return "the server is shutting down"
        state = self.state
        if state is State.READY:
            return None
        if state is State.LOST and self._loss is not None:
            return str(self._loss)
        return self._reason

    @property
    def pipeline(self) -> Pipeline | None:
        """For who looks only: it may be lost, or not ready yet."""
        return self._pipeline

    def ready_pipeline(self) -> Pipeline:
        """The pipeline, for a request; one whose lost worker is being replaced lets it wait.

        Raises:
            ApiError: 503 with the reason.
        """
        pipeline = self._pipeline
        is_open = self._state is State.READY and pipeline is not None and pipeline.lost is None
        if pipeline is not None and is_open and not self._is_draining:
            return pipeline
        reason = self.reason
        if reason is not None or self._pipeline is None:
            raise self.refusal(reason or "the workers are being looked at")
        return self._pipeline

    def refusal(self, reason: str) -> ApiError:
        """What a request hears while nothing can be generated."""
        return not_ready(f"not ready: {reason.rstrip('.')}.")

    def drain(self) -> None:
        """Take no request any more."""
        self._is_draining = True

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            Error: the pipeline could not be opened for the first time.
        """
        wait_s = RETRY_FIRST_S
        while True:
            try:
                async with AsyncExitStack() as stack:
                    pipeline = await self._open(stack)
                    self._set(State.READY, "")
                    self._log("ready", model=pipeline.model_name, workers=pipeline.holder)
                    self.opened.set()
                    wait_s = RETRY_FIRST_S
                    await self._until_lost(pipeline)
            except Error as exc:
                if not self.opened.is_set():
                    raise
                self._set(State.LOST, str(exc))
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MOST_S)

    @property
    def _loss(self) -> Error | None:
        """Why the pipeline that is open can generate nothing now."""
        pipeline = self._pipeline
        return None if pipeline is None else pipeline.lost or pipeline.mending

    async def _until_lost(self, pipeline: Pipeline) -> None:
        while True:
            lost = pipeline.lost
            if lost is not None:
                break
            await asyncio.sleep(LOOK_EVERY_S)  # requests find out for themselves, and at once
        self._log("given up", reason=lost)
        self._set(State.LOST, str(lost))

    def _chain_changed(self, loss: Error | None) -> None:
        """A worker was lost, or requests go on: told at once, however short it is."""
        if loss is not None:
            self.losses += 1
            self.last_loss = loss
            self._log("lost", reason=loss)
        elif self._pipeline is not None:
            self._log("going on", workers=self._pipeline.holder)

    async def _open(self, stack: AsyncExitStack) -> Pipeline:
        """A pipeline through which a token went; it closes with the stack."""
        wanted = dict(self._config.adapters)
        connection = self._config.connection
        if self._connect is not None:
            connection = await self._connect()
        pipeline = await stack.enter_async_context(
            open_pipeline(
                connection,
                Notices(),
                max_sequences=self._config.limits.max_concurrent,
                max_tokens_hint=None,
                adapters=tuple(wanted.values()),
                trace=self._trace,
                on_chain=self._chain_changed,
            )
        )
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                probe = await pipeline.generate(Prompt((0,)), PROBE)
        except TimeoutError as exc:
            raise Error(f"no token came through the workers in {PROBE_TIMEOUT_S:g} s") from exc
        if probe.error is not None:
            raise Error(f"no token goes through the workers: {probe.error}")
        self.adapters = wanted
        self._pipeline = pipeline
        stack.callback(self._forget)
        return pipeline

    def _forget(self) -> None:
        self._pipeline = None

    def _set(self, state: State, reason: str) -> None:
        self._state, self._reason = state, reason
