"""The nodes and partitions of a cluster as scontrol shows them: idle CPUs, memory, GPUs.

Pure: text in, values out. Memory is what Slurm may give to jobs; how much of a GPU's there is,
Slurm does not know, unless the type's name says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

MIB: Final = 1 << 20  # Slurm counts memory in these

# Flags behind a state that keep jobs from a node, whatever the state says.
UNUSABLE: Final = frozenset(
    {
        *("DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE"),
        *("INVAL", "INVALID_REG", "MAINT", "MAINTENANCE", "NOT_RESPONDING", "NO_RESPOND"),
        *("PERFCTRS", "POWERING_DOWN", "POWER_DOWN", "REBOOT", "REBOOT_ISSUED"),
        *("REBOOT_REQUESTED", "RESERVED", "UNKNOWN"),
    }
)
# "a100_80gb", "h100-80g", "1g.10gb": a type that tells its size.
_SIZE_IN_TYPE: Final = re.compile(r"(?:^|[-_.])(\d+)gb?$", re.IGNORECASE)
_GPU: Final = re.compile(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)(?:\([^)]*\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node."""

    name: str
    state: str  # as scontrol has it: "IDLE", "MIXED+DRAIN", "DOWN*"
    partitions: tuple[str, ...]
    cpus: int
    allocated_cpus: int
    memory_bytes: int  # that jobs may use
    allocated_memory_bytes: int
    os_free_bytes: int | None  # not used by any process, by the node's last report
    gpus: int
    used_gpus: int
    gpu_types: tuple[str, ...]
    reason: str = ""  # why it is down or drained

    @property
    def flags(self) -> frozenset[str]:
        return frozenset(it.rstrip("*~#!%$@^-") for it in self.state.upper().split("+"))

    @property
    def is_usable(self) -> bool:
        """Whether jobs may be put there, now or when it is free."""
        return not self.flags & UNUSABLE and "*" not in self.state

    @property
    def is_idle(self) -> bool:
        """Whether a job that wants it whole could have it now."""
        return self.is_usable and "IDLE" in self.flags and "COMPLETING" not in self.flags

    @property
    def idle_cpus(self) -> int:
        return max(0, self.cpus - self.allocated_cpus) if self.is_usable else 0

    @property
    def free_memory_bytes(self) -> int:
        """Not given to any job."""
        free = self.memory_bytes - self.allocated_memory_bytes
        return max(0, free) if self.is_usable else 0

    @property
    def idle_gpus(self) -> int:
        return max(0, self.gpus - self.used_gpus) if self.is_usable else 0

    @property
    def condition(self) -> str:
        """The state in a word, as sinfo has it."""
        if not self.flags.isdisjoint({"DRAIN", "DRAINED", "DRAINING"}):
            busy = not self.flags.isdisjoint({"ALLOCATED", "MIXED", "COMPLETING"})
            return "draining" if busy else "drained"
        words = [it for it in self.state.lower().split("+") if it]
        return "+".join(words) if not self.is_usable else words[0]

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Of one GPU, where the names of all its types tell; the least of them."""
        told = [_SIZE_IN_TYPE.search(it) for it in self.gpu_types]
        sizes = [int(it[1]) * 10**9 for it in told if it is not None]
        return min(sizes) if sizes and len(sizes) == len(told) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition."""

    name: str
    is_default: bool
    state: str  # "UP", "DOWN", "DRAIN", "INACTIVE"
    max_nodes: int | None  # that one job gets; None: no limit
    max_time: str  # as Slurm writes it


def parse_nodes(text: str) -> list[Node]:
    """What `scontrol --details show node` printed."""
    pages = re.split(r"^(?=NodeName=)", text, flags=re.MULTILINE)
    return [_node(page) for page in pages if page.startswith("NodeName=")]


def parse_partitions(text: str) -> list[Partition]:
    """What `scontrol show partition` printed."""
    pages = re.split(r"^(?=PartitionName=)", text, flags=re.MULTILINE)
    return [_partition(page) for page in pages if page.startswith("PartitionName=")]


def fold_names(names: Iterable[str]) -> str:
    """node1, node2, node3, gpu07 as "gpu07,node[1-3]", as Slurm writes lists of hosts."""
    parts = sorted(map(_prefix_and_digits, names), key=lambda it: (it[0], len(it[1]), it[1]))
    folded = []
    for (prefix, _), group in groupby(parts, key=lambda it: (it[0], bool(it[1]))):
        ranges = _ranges([digits for _, digits in group])
        is_single = len(ranges) == 1 and "-" not in ranges[0]
        folded.append(prefix + (ranges[0] if is_single else f"[{','.join(ranges)}]"))
    return ",".join(folded)


def _node(page: str) -> Node:
    values = _values(page)
    gres = _GPU.findall(values.get("Gres", ""))
    used = _GPU.findall(values.get("GresUsed", ""))
    in_use = sum(int(count) for _, count in used) if used else _tres_gpus(values.get("AllocTRES"))
    reason = re.search(r"^   Reason=(.*)$", page, re.MULTILINE)
    kept = _number(values.get("MemSpecLimit")) or 0  # for the system
    free = _number(values.get("FreeMem"))
    return Node(
        name=values["NodeName"],
        state=values.get("State", "UNKNOWN"),
        partitions=tuple(it for it in values.get("Partitions", "").split(",") if it),
        cpus=_number(values.get("CPUEfctv")) or _number(values.get("CPUTot")) or 0,
        allocated_cpus=_number(values.get("CPUAlloc")) or 0,
        memory_bytes=((_number(values.get("RealMemory")) or 0) - kept) * MIB,
        allocated_memory_bytes=(_number(values.get("AllocMem")) or 0) * MIB,
        os_free_bytes=None if free is None else free * MIB,
        gpus=sum(int(count) for _, count in gres),
        used_gpus=in_use,
        gpu_types=tuple(dict.fromkeys(kind for kind, _ in gres if kind)),
        reason=reason[1].strip() if reason else "",
    )


def _partition(page: str) -> Partition:
    values = _values(page)
    return Partition(
        name=values["PartitionName"],
        is_default=values.get("Default") == "YES",
        state=values.get("State", ""),
        max_nodes=_number(values.get("MaxNodes")),
        max_time=values.get("MaxTime", ""),
    )


def _values(page: str) -> dict[str, str]:
    """Of several equal keys the first: what people wrote comes last."""
    return dict(re.findall(r"(?:^|(?<=\s))([A-Za-z]\w*)=(\S*)", page)[::-1])


def _tres_gpus(tres: str | None) -> int:
    total = re.search(r"(?:^|,)gres/gpu=(\d+)", tres or "")
    if total:
        return int(total[1])
    return sum(map(int, re.findall(r"(?:^|,)gres/gpu:[^=,]+=(\d+)", tres or "")))


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _prefix_and_digits(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)(\d*)", name)
    assert match is not None  # it matches any name
    return match[1], match[2]


def _ranges(numbers: Sequence[str]) -> list[str]:
    """["1", "2", "3", "7"] as ["1-3", "7"]; numbers of different widths stay apart."""
    ranges: list[list[str]] = []
    for digits in numbers:
        last = ranges[-1][-1] if ranges else ""
        if digits and last.isdigit() and _is_next(last, digits):
            ranges[-1].append(digits)
        else:
            ranges.append([digits])
    return [it[0] if len(it) == 1 else f"{it[0]}-{it[-1]}" for it in ranges]


def _is_next(last: str, digits: str) -> bool:
    is_padded = last.startswith("0") or digits.startswith("0")
    return int(digits) == int(last) + 1 and (len(last) == len(digits) or not is_padded)
