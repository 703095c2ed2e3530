"""Which machine of how many this is, for a run of several processes: as told, or as Slurm says.

Knows Slurm's environment and asks it for the names of a step's nodes. Starts nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from proto.errors import UsageError

# Below the ports that systems give to outgoing connections (32768 on Linux), above services'.
FIRST_PORT: Final = 12_000
NUM_PORTS: Final = 16_000
STEPS_OF_A_JOB: Final = 16  # that may train at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """All machines of a run, and this one among them."""

    count: int = 1
    rank: int = 0  # of this machine
    main_address: str | None = None  # of the first one; None: there is one alone
    main_port: int = 0  # 0: any free one, which is possible on one machine alone

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1


def find_machines(
    environ: Mapping[str, str],
    *,
    count: int | None,
    rank: int | None,
    address: str | None,
    port: int | None,
) -> Machines:
    """What the options say, else what Slurm says, else this machine alone.

    Raises:
        UsageError: the options do not fit together, or Slurm's tasks are not one a node.
        Error: Slurm's commands fail.
    """
    if port is not None and not 0 <= port < 65536:
        raise UsageError(f"--main-process-port {port} must be from 0 to 65535.")
    if count is not None or rank is not None or address is not None:
        return _as_told(1 if count is None else count, rank, address, port)
    if "SLURM_JOB_ID" in environ:
        return _of_slurm(environ, port)
    return Machines(main_port=port or 0)


def _as_told(count: int, rank: int | None, address: str | None, port: int | None) -> Machines:
    if count < 1:
        raise UsageError(f"--num-machines {count} must be 1 or more.")
    if count == 1:
        if rank or address is not None:
            raise UsageError(
                "--machine-rank and --main-process-ip are for several machines: pass "
                "--num-machines as well."
            )
        return Machines(main_port=port or 0)
    missing = [
        name
        for name, value in (
            ("--machine-rank", rank),
            ("--main-process-ip", address),
            ("--main-process-port", port or None),
        )
        if value is None
    ]
    if missing:
        raise UsageError(
            f"--num-machines {count} needs {' and '.join(missing)} as well: the first machine's "
            "address and a port that is free there, the same on all machines."
        )
    assert rank is not None
    if not 0 <= rank < count:
        raise UsageError(f"--machine-rank {rank} must be from 0 to {count - 1}.")
    return Machines(count=count, rank=rank, main_address=address, main_port=port or 0)


def _of_slurm(environ: Mapping[str, str], port: int | None) -> Machines:
    """A task of a step: one a node. Anything else of a job is this machine alone."""
    job_nodes = _number(environ, "SLURM_JOB_NUM_NODES", 1)
    if "SLURM_STEP_ID" not in environ:
        if job_nodes > 1:
            raise UsageError(
                f"this job has {job_nodes} nodes, and only this one would train: start it as "
                "`srun --ntasks-per-node=1 manager finetune sft ...`, or pass --num-machines 1."
            )
        return Machines(main_port=port or 0)
    count = _number(environ, "SLURM_STEP_NUM_NODES", job_nodes)
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", count)
    if tasks != count:
        raise UsageError(
            f"srun started {tasks} tasks on {count} nodes, and each node wants one, which starts "
            "its processes itself: pass srun --ntasks-per-node=1."
        )
    if count == 1:
        return Machines(main_port=port or 0)
    return Machines(
        count=count,
        rank=_number(environ, "SLURM_NODEID", 0),
        main_address=_first_host(environ),
        main_port=port or _port_of(environ),
    )


def _port_of(environ: Mapping[str, str]) -> int:
    """The same on all nodes; another one for each job and step of some time."""
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    return FIRST_PORT + (job * STEPS_OF_A_JOB + step % STEPS_OF_A_JOB) % NUM_PORTS


def _first_host(environ: Mapping[str, str]) -> str:
    """The name of the step's first node, or its address where the name leads nowhere."""
    from manager.tasks.node_address import hostnames, node_address

    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    first = hostnames(nodes)[0]
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        return node_address(first)
    return first


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise UsageError(
            f"{name} is {text!r} in this environment, and Slurm writes a number there: unset it, "
            "or pass --num-machines."
        ) from None
