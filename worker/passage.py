"""One step on its way through this worker: received, computed, handed on.

Knows when it passed where, and whether anybody still waits for it. What is computed is
`worker.steps`'; where it goes is decided by who made it (`hand_on`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from proto.codec import StepPayload
from proto.framing import Frame
from proto.link import Link
from proto.messages import Step, StepReport
from worker.leases import OpenLease
from worker.steps import Outcome, StepComputer


class Passage:
    """A step, from its frame to its outcome; `worker.compute.Work`."""

    __slots__ = (
        "_hand_on",
        "computer",
        "epoch",
        "finished_s",
        "frame",
        "is_last",
        "lease",
        "num_tokens",
        "outcome",
        "payload",
        "received_s",
        "source",
        "started_s",
        "step",
    )

    def __init__(
        self,
        frame: Frame,
        step: Step,
        *,
        lease: OpenLease,
        computer: StepComputer,
        source: Link,
        hand_on: Callable[[Passage], None],
    ) -> None:
        """Take a step in.

        Raises:
            RemoteProtocolError: its payload is not of the length that it announces.
        """
        self.received_s = time.monotonic()
        self.frame, self.step, self.epoch = frame, step, frame.epoch
        self.lease, self.computer, self.source = lease, computer, source
        self.payload: StepPayload = computer.parse(step, frame.payload)
        self.num_tokens = self.payload.token_ids.nbytes // 4
        self.is_last = lease.is_last  # a newer route makes this step stale, never another kind
        self.outcome: Outcome | None = None  # None: not computed, as nobody waits for it
        self.started_s = self.finished_s = 0.0
        self._hand_on = hand_on

    @property
    def is_stale(self) -> bool:
        """Whether the lease is gone, or has another route now."""
        return self.lease.is_closed or self.epoch != self.lease.epoch

    @property
    def compute_s(self) -> float:
        """How long torch took."""
        return self.finished_s - self.started_s

    def compute(self) -> None:
        """On torch's thread."""
        if self.is_stale or not self.source.is_open:
            return
        self.started_s = time.monotonic()
        self.outcome = self.computer.compute(self.step, self.payload, is_last=self.is_last)
        self.finished_s = time.monotonic()

    def fault(self, reason: str) -> None:
        """Instead of computing it."""
        self.started_s = self.finished_s = time.monotonic()
        self.outcome = self.computer.fault(self.step, self.payload, reason)

    def finish(self) -> None:
        """On the event loop."""
        self._hand_on(self)

    def report(self) -> StepReport:
        """When it passed here; made once it is sent."""
        return StepReport(
            lease=self.lease.id,
            step=self.step.step,
            num_tokens=self.num_tokens,
            received_s=self.received_s,
            started_s=self.started_s,
            finished_s=self.finished_s,
            sent_s=time.monotonic(),
        )
