"""Decide whether the other end of a link still lives, and how far away it is in time.

Pure: the time comes in. Whatever was heard since the last beat counts as life, not only a Pong:
on a slow network the Pong stands behind a large frame that is still arriving. `proto.link` sends
what this asks for.
"""

from __future__ import annotations

from collections import deque
from typing import Final

# RTT is smoothed as TCP does it (RFC 6298): one eighth of every new sample.
RTT_WEIGHT: Final = 1 / 8
# The clock offset comes from the fastest exchange of the last ten seconds: what delays a ping
# widens its error, and ten seconds are short enough for clocks to drift by next to nothing.
OFFSET_SAMPLES: Final = 64
# Pings that may wait for their Pong; a peer whose reading rests answers none for a while.
MAX_WAITING_PINGS: Final = 64


class Heartbeat:
    """The state of one link's heartbeat; times are seconds of our monotonic clock."""

    def __init__(self, missed_limit: int, interval_s: float = 1.0) -> None:
        self.missed = 0  # beats in a row without a byte from the peer
        self.rtt_s: float | None = None
        self.clock_offset_s: float | None = None  # the peer's monotonic clock minus ours
        self._missed_limit, self._interval_s = missed_limit, interval_s
        self._next_number = 0
        self._sent_s: dict[int, float] = {}  # oldest first
        self._samples: deque[tuple[float, float]] = deque(maxlen=OFFSET_SAMPLES)

    def beat(self, heard: bool, late_s: float = 0.0) -> bool:
        """One interval has passed; False when the peer is to be given up.

        Args:
            heard: whether any byte came from the peer since the last beat.
            late_s: by how much this beat came too late. When it is more than an interval, it was
                we who slept, and what the peer sent meanwhile waits to be read: such a beat says
                nothing about the peer.
        """
        if heard:
            self.missed = 0
        elif late_s <= self._interval_s:
            self.missed += 1
        return self.missed < self._missed_limit

    def ping(self, now_s: float) -> int:
        """The number of a ping that is sent now."""
        number = self._next_number
        self._next_number = (number + 1) % 2**31
        self._sent_s[number] = now_s
        if len(self._sent_s) > MAX_WAITING_PINGS:
            del self._sent_s[next(iter(self._sent_s))]
        return number

    def pong(self, number: int, peer_clock_s: float, now_s: float) -> float | None:
        """The round trip of an answered ping; None where the number is not waited for."""
        sent_s = self._sent_s.pop(number, None)
        if sent_s is None:
            return None
        rtt_s = now_s - sent_s
        self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + RTT_WEIGHT * (rtt_s - self.rtt_s)
        self._samples.append((rtt_s, peer_clock_s - (sent_s + now_s) / 2))
        self.clock_offset_s = min(self._samples)[1]
        return rtt_s
