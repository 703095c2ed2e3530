"""HOST:PORT as people write it, and back. Pure: resolves no name and opens nothing."""

from __future__ import annotations

from typing import NamedTuple

from proto.errors import UsageError


class Address(NamedTuple):
    """Where a worker listens."""

    host: str  # a name or a number; IPv6 without its brackets
    port: int  # 0 only where a free one is to be picked

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """HOST:PORT or [IPV6]:PORT.

    Raises:
        UsageError: not of this form, or the port is not 0 to 65535.
    """
    host, colon, port_text = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        bad_host = ":" not in host
    else:
        bad_host = ":" in host or "[" in host or "]" in host
    if not colon or not host or bad_host or any(c.isspace() for c in host):
        raise UsageError(
            f"{text!r} is not an address: write HOST:PORT, for example 127.0.0.1:7710 or [::1]:7710"
        )
    if not (port_text.isascii() and port_text.isdigit() and int(port_text[:6]) <= 65535):
        raise UsageError(
            f"{text!r} is not an address: its port {port_text!r} is not a number from 0 to 65535"
        )
    return Address(host, int(port_text))
