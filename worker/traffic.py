"""Steps in and out: from a link to torch's thread, and from there to whoever comes next.

Runs on the event loop. Knows leases, their routes and epochs; a step that nobody waits for any
more is dropped here and counted. What is computed is `worker.steps`'.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakSet

from msgspec.structs import replace

from proto.errors import RemoteProtocolError
from proto.framing import MAX_PAYLOAD_BYTES, Frame
from proto.link import Link
from proto.messages import Step, StepDone, WorkerFacts
from worker.answers import answer
from worker.chain import NextLink, State
from worker.compute import Compute
from worker.leases import OpenLease
from worker.passage import Passage
from worker.status import Counters

# Of steps that wait for torch. A manager's steps of 512 tokens are 16 MiB in the widest models,
# and it has as many on their way as there are stages, and one more.
MAX_WAITING_BYTES: Final = 2 * MAX_PAYLOAD_BYTES
# Of steps that next workers have not read: each link has a bound of its own, and there is one for
# each lease.
MAX_UNREAD_BYTES: Final = 4 * MAX_PAYLOAD_BYTES


class Traffic:
    """All steps on their way through this worker."""

    def __init__(self, facts: WorkerFacts, name: str, compute: Compute, counters: Counters) -> None:
        self._facts, self._name = facts, name
        self._compute = compute
        self._counters = counters
        self._is_stopping = False
        self._waiting_bytes = 0
        self._followers: WeakSet[NextLink] = WeakSet()  # that were sent something

    def stop(self) -> None:
        """Take no more steps; what torch computes now is still handed on."""
        self._is_stopping = True

    def take(self, source: Link, lease: OpenLease, frame: Frame, step: Step) -> None:
        """A step came on a link of the lease.

        Raises:
            RemoteProtocolError: it may not come now, or its payload has another length than it
                says; the link that it came on is to be closed.
        """
        if lease.is_closed or frame.epoch < lease.epoch or self._is_stopping:
            lease.num_dropped += 1
            return
        computer = lease.computer
        way = State.OPEN if lease.next is None else lease.next.state
        if frame.epoch > lease.epoch or computer is None or way is State.CONNECTING:
            raise RemoteProtocolError(
                f"step {step.step} of epoch {frame.epoch} came before worker "
                f"{self._name} had answered the lease and the route of that epoch"
            )
        if way is State.LOST:  # the manager was told
            lease.num_dropped += 1
            return
        passage = Passage(
            frame, step, lease=lease, computer=computer, source=source, hand_on=self._computed
        )
        num_bytes = frame.payload.nbytes
        if passage.num_tokens > self._facts.max_step_tokens:
            passage.fault(
                f"a step of {passage.num_tokens} tokens is more than the "
                f"{self._facts.max_step_tokens} that this worker takes"
            )
            self._hand_on(passage)
        elif not self._has_room(num_bytes) or not self._compute.submit(passage):
            passage.fault("too many steps wait on this worker")
            self._hand_on(passage)
        else:
            self._waiting_bytes += num_bytes

    def _has_room(self, num_bytes: int) -> bool:
        """Whether so many more bytes may wait; one step always may."""
        return not self._waiting_bytes or self._waiting_bytes + num_bytes <= MAX_WAITING_BYTES

    def _computed(self, passage: Passage) -> None:
        self._waiting_bytes -= passage.frame.payload.nbytes
        self._hand_on(passage)

    def _hand_on(self, passage: Passage) -> None:
        """The outcome is here: to the next worker, or as tokens to the manager."""
        lease = passage.lease
        if passage.outcome is not None and passage.finished_s > passage.started_s:
            self._counters.count_step(passage.num_tokens, passage.compute_s)
        if passage.outcome is None or passage.is_stale:
            lease.num_dropped += 1
            return
        if passage.is_last:
            self._send_done(passage)
        elif lease.next is not None:
            self._send_on(passage, lease.next)
        if lease.is_traced:
            answer(lease.manager, passage.report(), epoch=passage.epoch)

    def _send_on(self, passage: Passage, following: NextLink) -> None:
        step, outcome, payload = passage.step, passage.outcome, passage.payload
        assert outcome is not None and outcome.hidden is not None
        self._followers.add(following)
        self._make_room(outcome.hidden.nbytes)
        following.send(
            replace(
                step,
                faults=[*step.faults, *outcome.faults],
                compute_s=[*step.compute_s, passage.compute_s],
            ),
            passage.frame.payload[: passage.frame.payload.nbytes - payload.hidden.nbytes],
            outcome.hidden,
            epoch=passage.epoch,
        )

    def _make_room(self, num_bytes: int) -> None:
        """Give up the next worker that has read least, when all together have read too little."""
        unread = {it: it.unsent_bytes for it in self._followers}
        if sum(unread.values()) + num_bytes > MAX_UNREAD_BYTES:
            slowest = max(unread, key=unread.__getitem__)
            slowest.give_up(
                f"it does not read: {unread[slowest]} of {sum(unread.values())} bytes that wait "
                "to be sent from this worker are its own"
            )

    def _send_done(self, passage: Passage) -> None:
        step, outcome = passage.step, passage.outcome
        assert outcome is not None
        done = StepDone(
            lease=step.lease,
            step=step.step,
            drawn=outcome.drawn,
            faults=[*step.faults, *outcome.faults],
            compute_s=[*step.compute_s, passage.compute_s],
            scored=outcome.scored,
        )
        answer(passage.lease.manager, done, *outcome.scores, epoch=passage.epoch)
