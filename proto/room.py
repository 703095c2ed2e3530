"""Memory for frames that are on their way, shared by all links of one listener. Pure.

Each link has a limit for one frame; many links at once could announce very much together. Small
frames are not counted, so that whoever is in order can still talk when others take all the room.
"""

from __future__ import annotations

from typing import Final

from proto.errors import RemoteProtocolError

SMALL_BYTES: Final = 64 * 1024


class Room:
    """So many bytes, of which readers take and give back; one frame always fits."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.taken_bytes = 0

    def take(self, num_bytes: int) -> int:
        """Before memory is taken for a frame; returns what is to be given back.

        Raises:
            RemoteProtocolError: too much is on its way already.
        """
        if num_bytes <= SMALL_BYTES:
            return 0
        if self.taken_bytes and self.taken_bytes + num_bytes > self._num_bytes:
            raise RemoteProtocolError(
                f"a frame of {num_bytes} bytes does not fit: {self.taken_bytes} bytes of others "
                f"are on their way to this worker, and {self._num_bytes} may be; send it later"
            )
        self.taken_bytes += num_bytes
        return num_bytes

    def give_back(self, num_bytes: int) -> None:
        """When the frame is complete, or given up."""
        self.taken_bytes -= num_bytes
