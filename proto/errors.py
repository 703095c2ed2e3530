"""The error tree of the whole project.

Every error a user can cause is one sentence: what, where, the offending value, how to mend it.
The command lines print `str(error)` and leave with `exit_code`; nothing else prints errors.
"""

from __future__ import annotations

from typing import ClassVar


class Error(Exception):
    """Anything that Comboio itself raises."""

    exit_code: ClassVar[int] = 1


class UsageError(Error):
    """The caller's mistake: a bad option, path, or request. Exit 2, no traceback."""

    exit_code: ClassVar[int] = 2


class ModelError(UsageError):
    """The checkpoint is missing, damaged, or of a kind that cannot be run."""


class ModelUnfit(ModelError):
    """The checkpoint is whole, but its architecture cannot be run in sections."""


class AdapterError(UsageError):
    """An adapter that cannot be served: missing, damaged, of another kind, or of another model."""


class SplitError(UsageError):
    """The layers cannot be spread over the stages asked for."""


class RequestRefused(UsageError):
    """One request that can never run: empty, longer than the context, larger than the KV."""


class ProtocolError(Error):
    """Base of what goes wrong on a link."""


class LocalProtocolError(ProtocolError):
    """Our own side tried to send what the session does not allow now."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that are not a frame, not a known message, or out of order."""


class FrameTooLarge(RemoteProtocolError):
    """A header announces more bytes than this link accepts; nothing was allocated."""

    def __init__(self, part: str, announced_bytes: int, limit_bytes: int) -> None:
        self.part, self.announced_bytes, self.limit_bytes = part, announced_bytes, limit_bytes
        super().__init__(
            f"a frame announces {announced_bytes} bytes of {part}, this link accepts {limit_bytes}"
        )


class FrameCorrupt(RemoteProtocolError):
    """A checksum, the magic, or a reserved field is wrong."""


class VersionMismatch(RemoteProtocolError):
    """The two ends of a link come from releases that do not speak the same protocol."""

    def __init__(self, ours: int, theirs: int) -> None:
        self.ours, self.theirs = ours, theirs
        super().__init__(
            f"this side speaks protocol version {ours}, the other side version {theirs}: "
            "install the same release of comboio on both"
        )


class AuthenticationFailed(ProtocolError):
    """The peer does not know the secret, or it knows another one."""


class WorkerRefused(Error):
    """A worker said no: its own words, with its address in front."""


class PeerLost(Error):
    """Whoever was at the other end of a link went away; `peer` is an address."""

    def __init__(self, peer: str, reason: str) -> None:
        self.peer, self.reason = peer, reason
        super().__init__(f"{peer} was lost: {reason}")


class WorkerLoading(WorkerRefused):
    """A worker that is still reading its weights; it will take links when it has them."""

    def __init__(self, worker: str, percent: int) -> None:
        self.worker, self.percent = worker, percent
        super().__init__(f"worker {worker} is still loading ({percent} %)")


class WorkerLost(PeerLost):
    """A worker went away: its socket closed, or it stopped answering."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(worker, reason)
        self.worker = worker
        self.args = (f"worker {worker} was lost: {reason}",)


class WorkerUnreachable(WorkerLost):
    """No link could be opened to a worker; its address or its start is to be looked at."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(worker, reason)
        self.args = (
            f"no worker answers at {worker} ({reason}): "
            f"start one there with `worker --listen {worker} ...`, or check --workers",
        )


class StepFailed(Error):
    """A worker could not compute a step for one sequence; the others go on."""


class JobError(Error):
    """A job could not be submitted, found, or ended."""
