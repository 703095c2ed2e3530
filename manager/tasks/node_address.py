"""The address of this node at which the job's other nodes reach it. Sends nothing."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from manager.slurm.client import run_slurm
from manager.tasks.slurm_task import SlurmTask
from proto.errors import Error, UsageError


def own_address(task: SlurmTask, interface: str | None) -> str:
    """An address literal, IPv4 where there is one.

    Args:
        interface: name of a network interface, as "ib0"; None: the one that leads to the others.
    Raises:
        UsageError: this node has no such interface, or it has no address.
        Error: the other nodes' names lead nowhere.
    """
    if interface is not None:
        return interface_address(interface, task.node)
    if task.num_nodes == 1:
        return "127.0.0.1"
    others = [name for name in hostnames(task.node_list) if name != task.node]
    return _source_address(_resolve(others[0]))


def hostnames(node_list: str) -> list[str]:
    """The names in "node[1-3]", as `scontrol show hostnames` gives them."""
    return run_slurm(["scontrol", "show", "hostnames", node_list]).split()


def interface_address(interface: str, node: str) -> str:
    """The first IPv4 address of an interface, else its first IPv6 one.

    Raises:
        UsageError: there is none; names those that there are.
    """
    import psutil

    found = psutil.net_if_addrs()
    if interface not in found:
        raise UsageError(
            f"--interface {interface}: {node} has no such network interface; "
            f"it has {', '.join(sorted(found))}."
        )
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found[interface]:
            if entry.family == family and not entry.address.startswith("fe80:"):
                return str(entry.address)
    raise UsageError(f"--interface {interface}: it has no address on {node}; name another one.")


def _resolve(name: str) -> str:
    """An address of another node: by its name, else as Slurm itself reaches it."""
    for host in (name, node_address(name)):
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
        except OSError:
            continue
        return _ipv4_first([str(entry[4][0]) for entry in found])
    raise Error(
        f"the name of node {name} leads to no address on this node: say with --interface which "
        "network the nodes share."
    )


def node_address(name: str) -> str:
    """How Slurm itself reaches a node; its name where Slurm does not say."""
    said = run_slurm(["scontrol", "-o", "show", "node", name])
    match = re.search(r"\bNodeAddr=(\S+)", said)
    return match[1] if match else name


def _ipv4_first(addresses: Sequence[str]) -> str:
    return next((it for it in addresses if ":" not in it), addresses[0])


def _source_address(target: str) -> str:
    """What this node calls itself on the way to `target`. Connecting UDP sends nothing."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError as exc:
            raise Error(
                f"no network leads to {target}: {exc.strerror}; say with --interface which "
                "network the nodes share."
            ) from exc
        return str(probe.getsockname()[0])
