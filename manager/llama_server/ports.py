"""Which TCP ports of this machine are free, and which process listens on one."""

from __future__ import annotations

import socket

import psutil

from proto.errors import UsageError


def free_port(host: str) -> int:
    """A port that nobody has now; it may be taken before it is used."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_free(host: str, port: int, *, key: str) -> None:
    """Refuse a port that is taken, or an address that this machine has not.

    Args:
        host: an IPv4 address.
        key: what sets the port, for the sentence.
    Raises:
        UsageError: naming the port and the key.
    """
    with socket.socket() as probe:
        # A port whose last connections are still timing out is free for llama.cpp's programs.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Bind alone passes beside a socket that is bound with the same option.
            probe.listen(1)
        except PermissionError:
            raise UsageError(
                f"port {port} of {host} is for the system alone: set {key} to one above 1023."
            ) from None
        except OSError as exc:
            raise UsageError(
                f"port {port} of {host} cannot be used ({exc.strerror}): "
                f"set {key} to another one, or leave it out for a free one."
            ) from exc


def listens(pid: int, port: int) -> bool:
    """Whether this process, and no other, has a socket that takes connections on the port."""
    try:
        process = psutil.Process(pid)
        # psutil 6 has renamed it
        look = getattr(process, "net_connections", None) or process.connections
        sockets = look(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # not ours to look at: whoever answers there is believed
    return any(it.status == psutil.CONN_LISTEN and it.laddr.port == port for it in sockets)
