"""Which workers to use, as people name them: lists of `HOST:PORT`, and the default ones.

Pure. Resolves no name and opens no socket.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from proto.address import Address, parse_address
from proto.errors import UsageError

DEFAULT_FIRST: Final = Address("127.0.0.1", 7710)  # a worker's section 0; section I has port 7710+I
MAX_WORKERS: Final = 1024


def parse_addresses(texts: Iterable[str]) -> tuple[Address, ...]:
    """Read several addresses; each text may itself be a list with commas.

    Raises:
        UsageError: one of them is no address, stands twice, or there is none.
    """
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    addresses = tuple(parse_address(part) for part in parts)
    if not addresses:
        raise UsageError("no worker address was given: write HOST:PORT,HOST:PORT,...")
    if any(address.port == 0 for address in addresses):
        raise UsageError("a worker cannot be called at port 0: write the port of its ready line.")
    twice = next((a for at, a in enumerate(addresses) if a in addresses[:at]), None)
    if twice is not None:
        raise UsageError(f"worker {twice} is named twice: name every worker once.")
    if len(addresses) > MAX_WORKERS:
        raise UsageError(f"{len(addresses)} workers were named: at most {MAX_WORKERS} can be used.")
    return addresses


def neighbours(first: Address, num_sections: int) -> tuple[Address, ...]:
    """The addresses of all sections, where section 0 listens at `first` and ports follow."""
    return tuple(Address(first.host, first.port + index) for index in range(num_sections))


def is_loopback(address: Address) -> bool:
    """Whether only processes on the same machine reach it."""
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost" or address.host.endswith(".localhost")
