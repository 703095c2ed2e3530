"""What waits at the two ends of a link: frames nobody took yet, bytes the peer has not read.

Both are bounded. They close nothing; `proto.link_protocol` acts on what they say.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from proto.framing import KIB, MIB, Buffer, Frame

# Below this the buffers of a frame are joined into one write: a copy of 64 KiB costs less than
# handing several buffers through the event loop and the kernel.
JOIN_BYTES: Final = 64 * KIB
# Too much is unsent above this, until it has fallen to a quarter: a second of a slow network.
DRAIN_BYTES: Final = 4 * MIB


class Inbox:
    """Frames that came and wait for `Link.receive`; one owner waits at a time."""

    def __init__(self, max_frames: int) -> None:
        self._frames: deque[Frame] = deque()
        self._max_frames = max_frames
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def full(self) -> bool:
        """Whether the link should take no more from the network."""
        return len(self._frames) >= self._max_frames

    def put(self, frame: Frame) -> None:
        """Add one frame; never refuses, since its bytes are here already."""
        self._frames.append(frame)
        self.wake()

    def take(self) -> Frame:
        """The oldest frame."""
        return self._frames.popleft()

    async def wait(self, timeout_s: float | None) -> None:
        """Until there is a frame or `wake` is called; raises asyncio.TimeoutError."""
        assert self._waiter is None, "somebody waits already"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):  # `wait_for` can lose a cancellation
                await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """Let the waiting owner look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Outbox:
    """Bytes on their way to the kernel: how many, for how long, and who waits for them to go."""

    def __init__(self, max_unsent_bytes: int, stalled_beats: float) -> None:
        self.sent_bytes = 0
        self._max_unsent_bytes, self._max_stalled_beats = max_unsent_bytes, stalled_beats
        self._transport: asyncio.Transport | None = None
        self._stopped = False
        self._gone_bytes = self._stalled_beats = 0  # what had left us when last looked at
        self._waiters: list[asyncio.Future[None]] = []

    def attach(self, transport: asyncio.Transport) -> None:
        """Write there; its owner calls `stop` and `go` when it says so."""
        transport.set_write_buffer_limits(high=DRAIN_BYTES)
        self._transport = transport

    def detach(self) -> None:
        """The transport is closed: nothing waits any more."""
        self._transport = None
        self.go()

    @property
    def unsent_bytes(self) -> int:
        """What was written and has not reached the kernel."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may wait; one frame may always go when nothing waits."""
        unsent = self.unsent_bytes
        return unsent == 0 or unsent + num_bytes <= self._max_unsent_bytes

    def write(self, buffers: list[Buffer]) -> None:
        """Hand over to the event loop; nobody may write into the buffers any more."""
        if self._transport is None or not buffers:
            return
        num_bytes = sum(map(len, buffers))
        self.sent_bytes += num_bytes
        if num_bytes <= JOIN_BYTES:
            self._transport.write(b"".join(buffers))
            return
        for buffer in buffers:  # asyncio's writelines joined them before Python 3.12
            self._transport.write(buffer)

    def stop(self) -> None:
        """Too much is unsent: `wait` waits from here on."""
        self._stopped, self._stalled_beats = True, 0

    def go(self) -> None:
        """There is room again, or the link is closed."""
        self._stopped = False
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    @property
    def stopped(self) -> bool:
        """Whether too much is unsent."""
        return self._stopped

    def beat(self) -> bool:
        """One heartbeat has passed; False when the peer has read nothing for too long."""
        gone = self.sent_bytes - self.unsent_bytes  # what is unsent may grow meanwhile
        self._stalled_beats = 0 if gone > self._gone_bytes else self._stalled_beats + 1
        self._gone_bytes = gone
        return self._stalled_beats < self._max_stalled_beats

    async def wait(self) -> None:
        """Until `go`; at once when there is room."""
        if self._stopped:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
