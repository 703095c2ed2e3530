"""What the owner of a link may want otherwise than the defaults. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proto.errors import UsageError
from proto.framing import MAX_METADATA_BYTES, MAX_PAYLOAD_BYTES, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Deadlines and bounds of one link; both ends should agree on `max_payload_bytes`."""

    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    handshake_timeout_s: float = 5.0
    heartbeat_s: float = 0.15
    # So many intervals without a byte from the peer end the link: after 0.75 to 0.9 s.
    missed_heartbeats: int = 5
    # A peer that does not read: room for one frame of the largest size and what goes beside it.
    max_unsent_bytes: int = MAX_PAYLOAD_BYTES + 64 * MIB
    stalled_s: float = 60.0  # unsent bytes that do not become fewer for so long end the link
    max_queued_frames: int = 64  # for `Link.receive()`; then the link rests its reading

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(f"{name} is {value}: a link needs it above 0")


# Of an opener: somebody waits for what it called the worker for, and whether a worker lives must be
# known within a second. The worker's event loop answers while torch computes.
DEFAULT_SETTINGS: Final = LinkSettings()
# Of a listener: nobody waits for it, and a manager that imports a large library for a moment, or
# whose terminal was paused, is not gone. One that died closes its socket, which is seen at once.
# Its answers are small, so a peer that does not read needs little room: thousands of tokens, or the
# log-probabilities of 20 steps of 512 tokens of a prompt, at 804 bytes each.
LISTENER_SETTINGS: Final = LinkSettings(
    missed_heartbeats=20, max_unsent_bytes=8 * MAX_METADATA_BYTES
)
