"""The link to the next worker of the chain, on behalf of one lease and one epoch.

Knows how it is made, what must agree between neighbours, and that losing it is told once. Knows
nothing of what is sent.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable

from proto.errors import Error, LocalProtocolError, PeerLost
from proto.framing import Buffer
from proto.link import Link
from proto.messages import Message, WorkerFacts
from worker.logs import fields

log = logging.getLogger("comboio.worker")


class State(enum.Enum):
    """Where it stands; it only moves forward."""

    CONNECTING = "connecting"
    OPEN = "open"
    LOST = "lost"  # or replaced, or never made


class NextLink:
    """Made when a Route comes, replaced by the next Route."""

    def __init__(
        self,
        address: str,
        *,
        connect: Callable[[], Awaitable[Link]],
        ours: WorkerFacts,
        name: str,
        on_open: Callable[[], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Begin to connect; exactly one of the callbacks comes, and `on_lost` may follow.

        Args:
            address: HOST:PORT of the next worker, as the manager wrote it.
            connect: opens a link there.
            ours: what this worker holds, which the next one must continue.
            name: this worker's HOST:PORT, for sentences.
            on_open: the link stands.
            on_lost: it broke or could not be made; gets one sentence that names the address.
        """
        self.address = address
        self.state = State.CONNECTING
        self._ours, self._name = ours, name
        self._on_open, self._on_lost = on_open, on_lost
        self._link: Link | None = None
        self._task = asyncio.get_running_loop().create_task(self._open(connect))

    def send(self, message: Message, *payload: Buffer, epoch: int) -> None:
        """Send one frame; nothing happens on a link that is not open: that was told."""
        if self._link is not None and self.state is State.OPEN:
            try:
                self._link.send(message, *payload, epoch=epoch)
            except PeerLost:
                pass  # on_closed says so
            except LocalProtocolError as exc:
                self._link.fail(exc)  # and so it does here

    @property
    def unsent_bytes(self) -> int:
        """What was sent and has not left this process."""
        return 0 if self._link is None else self._link.unsent_bytes

    def give_up(self, reason: str) -> None:
        """Lose it because it does not read."""
        if self._link is not None:
            self._link.abort(reason)

    def close(self, reason: str) -> None:
        """Leave it on purpose; no callback comes any more."""
        self.state = State.LOST
        self._task.cancel()
        if self._link is not None:
            self._link.close_soon(reason)

    async def _open(self, connect: Callable[[], Awaitable[Link]]) -> None:
        try:
            link = await connect()
        except Error as exc:
            self._lose(_naming(self.address, str(exc)))
            return
        if self.state is not State.CONNECTING:
            link.close_soon("a newer route replaced this link")
            return
        assert link.welcome is not None
        objection = self._mismatch(link.welcome.worker)
        if objection is not None:
            link.close_soon(objection)
            self._lose(objection)
            return
        self._link = link
        link.on_closed = self._closed
        self.state = State.OPEN
        log.info("next link open", extra=fields(next=self.address))
        self._on_open()

    def _closed(self, error: Exception | None) -> None:
        assert self._link is not None
        if error is not None:
            reason = str(error)
        else:
            reason = f"it said goodbye: {self._link.goodbye or 'no reason given'}"
        self._lose(_naming(self.address, reason))

    def _lose(self, reason: str) -> None:
        if self.state is State.LOST:
            return
        self.state = State.LOST
        log.info("next link lost", extra=fields(next=self.address, reason=reason))
        self._on_lost(reason)

    def _mismatch(self, theirs: WorkerFacts) -> str | None:
        """Why that worker cannot come after this one, in one sentence; None if it can."""
        ours, next_one, this_one = self._ours, f"worker {self.address}", f"worker {self._name}"
        if theirs.fingerprint != ours.fingerprint:
            return (
                f"{next_one} holds another model ({theirs.model}) than {this_one} "
                f"({ours.model}): start both from the same checkpoint"
            )
        if theirs.dtype != ours.dtype:
            return (
                f"{next_one} computes in {theirs.dtype}, {this_one} in {ours.dtype}: "
                "start both with the same --dtype"
            )
        if theirs.start_layer != ours.end_layer:
            return (
                f"{next_one} holds layers {theirs.start_layer}:{theirs.end_layer}, which do not "
                f"follow layers {ours.start_layer}:{ours.end_layer} of {this_one}"
            )
        return None


def _naming(address: str, reason: str) -> str:
    return reason if address in reason else f"worker {address}: {reason}"
