"""Where the first rank of a run is, and what the others show there.

Under mpirun the address travels over MPI, which is then ended at once; under srun it follows from
the job's nodes and number, and MPI is never touched; torchrun brings a store of its own. Whoever
sets MASTER_ADDR and MASTER_PORT decides himself. Ranks of one host meet on loopback.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from manager.finetune.ranks_launch import MPIRUN, SRUN, TORCHRUN, Launch
from manager.finetune.ranks_link import LostError
from proto.errors import Error, UsageError

LOOPBACK: Final = "127.0.0.1"
# Below Linux's own ports for outgoing connections, which begin at 32768.
FIRST_PORT, NUM_PORTS = 15_000, 16_000
# Neighbours on a shared node may have taken some.
TRIED_PORTS: Final = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where the first rank is, and what the others show there."""

    host: str  # LOOPBACK if all are on one
    ports: Sequence[int]
    token: str
    listener: socket.socket | None = None  # the first rank's, where it is bound already


def find_place(launch: Launch, environ: Mapping[str, str]) -> Place:
    """As the launcher has it.

    Raises:
        UsageError: the launcher left out what is needed.
        LostError: the first rank's node is not known.
    """
    if launch.num_ranks == 1:
        return Place(LOOPBACK, (), "")
    named = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if launch.launcher == TORCHRUN:
        return _by_store(launch, environ)
    if named[0] and named[1]:
        return Place(named[0], [_port(named[1])], f"{named[0]}:{named[1]}")
    if launch.launcher == SRUN:
        return _by_slurm(environ)
    assert launch.launcher == MPIRUN
    return _by_mpi(launch, environ)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UsageError(f"MASTER_PORT={text!r} is no port: unset it, or write 1 to 65535.")
    return int(text)


def _by_slurm(environ: Mapping[str, str]) -> Place:
    """The step's first node, and a port that follows from the job and the step."""
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    number = int(job) * 64 + int(step) * TRIED_PORTS if job.isdigit() and step.isdigit() else 0
    first = FIRST_PORT + number % (NUM_PORTS - TRIED_PORTS)
    ports = range(first, first + TRIED_PORTS)
    return Place(environ.get("MASTER_ADDR") or _first_node(environ), ports, f"{job}.{step}")


def _first_node(environ: Mapping[str, str]) -> str:
    if environ.get("SLURM_STEP_NUM_NODES") == "1":
        return LOOPBACK
    from manager.slurm.client import run_slurm

    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    try:
        names = run_slurm(["scontrol", "show", "hostnames", nodes], environ=environ).split()
    except Error as exc:
        raise LostError(
            f"the first node of {nodes} is not known here ({exc}); set MASTER_ADDR to it"
        ) from exc
    if not names:
        raise LostError(f"SLURM_STEP_NODELIST={nodes!r} names no node: set MASTER_ADDR to one")
    return names[0]


def _by_mpi(launch: Launch, environ: Mapping[str, str]) -> Place:
    """Over MPI, which is not needed any more afterwards."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as exc:  # RuntimeError: it found no MPI library
        raise UsageError(
            f"mpirun started this, and mpi4py cannot be used ({str(exc).splitlines()[0]}): "
            "pip install mpi4py, with an MPI library, or set MASTER_ADDR and MASTER_PORT "
            "for all ranks (mpirun -x)."
        ) from exc
    world = MPI.COMM_WORLD
    try:
        if world.Get_size() != launch.num_ranks:
            raise UsageError(
                f"mpirun started {launch.num_ranks} ranks, and mpi4py sees {world.Get_size()}: it "
                "was built for another MPI than this mpirun's; reinstall mpi4py with this one "
                "loaded, or set MASTER_ADDR and MASTER_PORT for all ranks (mpirun -x)."
            )
        hosts = world.allgather(socket.gethostname())
        host = LOOPBACK if len(set(hosts)) == 1 else environ.get("MASTER_ADDR") or hosts[0]
        listener = bind(host, 0) if launch.rank == 0 else None
        port = listener.getsockname()[1] if listener is not None else None
        port, token = world.bcast((port, secrets.token_hex(16)), root=0)
    finally:
        MPI.Finalize()
    return Place(host, [port], token, listener)


def _by_store(launch: Launch, environ: Mapping[str, str]) -> Place:
    """Over the store that torchrun's own agents hold."""
    dist: Any = import_module("torch.distributed")
    store, _, _ = next(iter(dist.rendezvous("env://", launch.rank, launch.num_ranks)))
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"comboio/first/{attempt}"
    if launch.rank:
        host, port, token = str(store.get(key), "utf-8").split()
        return Place(host, [int(port)], token)
    is_one_host = environ.get("LOCAL_WORLD_SIZE") == str(launch.num_ranks)
    host = LOOPBACK if is_one_host else socket.gethostname()
    listener, token = bind(host, 0), secrets.token_hex(16)
    port = listener.getsockname()[1]
    store.set(key, f"{host} {port} {token}")
    return Place(host, [port], token, listener)


def listen(place: Place) -> socket.socket:
    """For the first rank.

    Raises:
        LostError: none of the place's ports is free.
    """
    for port in place.ports:
        try:
            return bind(place.host, port)
        except OSError as exc:
            reason = exc
    raise LostError(
        f"rank 0 can listen at none of the ports {', '.join(map(str, place.ports))} "
        f"({reason.strerror}): set MASTER_PORT to a free one, for all ranks"
    )


def bind(host: str, port: int) -> socket.socket:
    """On loopback if all ranks are on this host; else wherever other nodes come from."""
    listener = socket.socket(socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK if host == LOOPBACK else "", port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
