"""The connection that each rank of a run keeps to the first one.

How it is found, and lines of JSON over it. A host without power is noticed by the kernel's
keepalive. Knows nothing of what is said.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from proto.errors import Error

# Programs start slowly where hundreds of them read the same file system.
JOIN_S: Final = 300.0
# For what is said by somebody who is about to end.
GRACE_S: Final = 3.0
MAX_LINE_BYTES: Final = 64 * 1024
# A host that does not answer for 5 + 5 x 3 s is down; a busy process's kernel does answer.
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Who a rank is."""

    rank: int
    host: str
    pid: int
    local_rank: int


class LostError(Error):
    """The ranks did not all come together."""


class Link:
    """Lines of JSON over one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._read = b""

    @property
    def peer(self) -> str:
        """Its address."""
        return str(self._connection.getpeername()[0])

    def send(self, said: dict[str, Any]) -> None:
        """One line; a connection that broke is noticed by who reads."""
        try:
            self._connection.sendall(json.dumps(said).encode() + b"\n")
        except OSError:
            pass

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """One line; None when there will be none."""
        self._connection.settimeout(timeout_s)
        try:
            while b"\n" not in self._read:
                part = self._connection.recv(4096)
                if not part or len(self._read) > MAX_LINE_BYTES:
                    return None
                self._read += part
        except OSError:
            return None
        line, _, self._read = self._read.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            return None
        return said if isinstance(said, dict) else None

    def close(self) -> None:
        """Say nothing more."""
        self._connection.close()


def greet(link: Link, token: str) -> Member | None:
    """Who is at the other end; None where it is no rank of this run."""
    link.send({"run": token})
    said = link.receive(GRACE_S)
    try:
        return Member(**said["member"]) if said is not None and said.get("run") == token else None
    except (KeyError, TypeError):
        return None


def find(addresses: Sequence[tuple[str, int]], token: str, me: Member) -> Link:
    """The way to the first rank, once it is there.

    Raises:
        LostError: it is at none of these addresses.
    """
    give_up_s = time.monotonic() + JOIN_S
    said = "nobody listens"
    while time.monotonic() < give_up_s:
        for host, port in addresses:
            try:
                link = Link(socket.create_connection((host, port), timeout=GRACE_S))
            except OSError as exc:
                said = exc.strerror or str(exc)
                continue
            greeting = link.receive(GRACE_S)
            if greeting is not None and greeting.get("run") == token:
                link.send({"run": token, "member": asdict(me)})
                return link
            link.close()
            said = "another program answers"
        time.sleep(0.1)  # the first rank may start later than this one
    where = " or ".join(f"{host}:{port}" for host, port in addresses[:2])
    raise LostError(
        f"rank {me.rank} on {me.host} cannot reach rank 0 at {where} ({said}): set MASTER_ADDR to "
        "an address of its host that all nodes reach, and MASTER_PORT to a free port"
    )
