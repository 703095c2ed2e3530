"""What the owner of a link may want otherwise than the defaults. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proto.errors import UsageError
from proto.framing import MAX_PAYLOAD_BYTES, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Deadlines and bounds of one link; both ends should agree on `max_payload_bytes`."""

    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    handshake_timeout_s: float = 5.0
    heartbeat_s: float = 1.0
    missed_heartbeats: int = 3  # so many intervals without a byte from the peer end the link
    # A peer that does not read: room for one frame of the largest size and what goes beside it.
    max_unsent_bytes: int = MAX_PAYLOAD_BYTES + 64 * MIB
    stalled_s: float = 60.0  # unsent bytes that do not become fewer for so long end the link
    max_queued_frames: int = 64  # for `Link.receive()`; then the link rests its reading

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(f"{name} is {value}: a link needs it above 0")


DEFAULT_SETTINGS: Final = LinkSettings()
