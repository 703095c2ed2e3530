"""Bring the ranks of a run together: where the first one is, and torch's store to talk by.

Under mpirun the address travels over MPI, which is then ended at once; under srun it follows from
the job's nodes and number, and MPI is never touched; torchrun brings a store of its own. Whoever
sets MASTER_ADDR and MASTER_PORT decides himself. Ranks of one host meet on loopback.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from manager.finetune.axonn_launch import MPIRUN, SRUN, TORCHRUN, Launch
from manager.finetune.axonn_link import LostError, Member
from manager.finetune.axonn_watch import Hub, Spoke
from proto.errors import Error, UsageError

LOOPBACK: Final = "127.0.0.1"
# Below Linux's own ports for outgoing connections, which begin at 32768.
FIRST_PORT, NUM_PORTS = 15_000, 16_000
# Neighbours on a shared node may have taken some.
TRIED_PORTS: Final = 8


@dataclass(frozen=True, slots=True)
class Meeting:
    """All ranks are there."""

    watch: Hub | Spoke
    store: Any  # torch.distributed's


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the first rank is, and what the others show there."""

    host: str  # LOOPBACK if all are on one
    ports: Sequence[int]
    token: str
    listener: socket.socket | None = None  # the first rank's, where it is bound already


def meet(launch: Launch, environ: Mapping[str, str] = os.environ) -> Meeting:
    """Find the others.

    Raises:
        UsageError: the launcher left out what is needed.
        LostError: some of them do not come.
    """
    # It warns of each address without a name in DNS; nodes of a cluster often have none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    dist: Any = import_module("torch.distributed")  # some of its names are not declared
    me = Member(
        rank=launch.rank,
        host=socket.gethostname().partition(".")[0],
        pid=os.getpid(),
        local_rank=launch.local_rank,
    )
    if launch.num_ranks == 1:
        return Meeting(Hub(me, 1, None, ""), dist.HashStore())
    place = _place(launch, environ)
    if launch.rank == 0:
        listener = place.listener or _listen(place)
        hub = Hub(me, launch.num_ranks, listener, place.token)
        store, port = _first_store(dist, place.host, launch.num_ranks)
        hub.start({"port": port})
        return Meeting(hub, store)
    spoke = Spoke(me, launch.num_ranks, [(place.host, it) for it in place.ports], place.token)
    facts = spoke.start()
    store = dist.TCPStore(spoke.peer, int(facts["port"]), launch.num_ranks, is_master=False)
    spoke.watch()
    return Meeting(spoke, store)


def _first_store(dist: Any, host: str, num_ranks: int) -> tuple[Any, int]:
    """torch's store, which the other ranks connect to; it keeps the socket."""
    listener = _bind(host, 0)
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        host,
        port,
        num_ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _listen(place: _Place) -> socket.socket:
    for port in place.ports:
        try:
            return _bind(place.host, port)
        except OSError as exc:
            reason = exc
    raise LostError(
        f"rank 0 can listen at none of the ports {', '.join(map(str, place.ports))} "
        f"({reason.strerror}): set MASTER_PORT to a free one, for all ranks"
    )


def _bind(host: str, port: int) -> socket.socket:
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


def _place(launch: Launch, environ: Mapping[str, str]) -> _Place:
    named = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if launch.launcher == TORCHRUN:
        return _by_store(launch, environ)
    if named[0] and named[1]:
        return _Place(named[0], [_port(named[1])], f"{named[0]}:{named[1]}")
    if launch.launcher == SRUN:
        return _by_slurm(environ)
    assert launch.launcher == MPIRUN
    return _by_mpi(launch, environ)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UsageError(f"MASTER_PORT={text!r} is no port: unset it, or write 1 to 65535.")
    return int(text)


def _by_slurm(environ: Mapping[str, str]) -> _Place:
    """The step's first node, and a port that follows from the job and the step."""
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    number = int(job) * 64 + int(step) * TRIED_PORTS if job.isdigit() and step.isdigit() else 0
    first = FIRST_PORT + number % (NUM_PORTS - TRIED_PORTS)
    ports = range(first, first + TRIED_PORTS)
    return _Place(environ.get("MASTER_ADDR") or _first_node(environ), ports, f"{job}.{step}")


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


def _by_mpi(launch: Launch, environ: Mapping[str, str]) -> _Place:
    """Over MPI, which is not needed any more afterwards."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as exc:  # RuntimeError: it found no MPI library
        raise UsageError(
            f"mpirun started this, and mpi4py cannot be used ({str(exc).splitlines()[0]}): "
            "pip install 'comboio[axonn]' and an MPI library, or set MASTER_ADDR and MASTER_PORT "
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
        listener = _bind(host, 0) if launch.rank == 0 else None
        port = listener.getsockname()[1] if listener is not None else None
        port, token = world.bcast((port, secrets.token_hex(16)), root=0)
    finally:
        MPI.Finalize()
    return _Place(host, [port], token, listener)


def _by_store(launch: Launch, environ: Mapping[str, str]) -> _Place:
    """Over the store that torchrun's own agents hold."""
    dist: Any = import_module("torch.distributed")
    store, _, _ = next(iter(dist.rendezvous("env://", launch.rank, launch.num_ranks)))
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"comboio/first/{attempt}"
    if launch.rank:
        host, port, token = str(store.get(key), "utf-8").split()
        return _Place(host, [int(port)], token)
    is_one_host = environ.get("LOCAL_WORLD_SIZE") == str(launch.num_ranks)
    host = LOOPBACK if is_one_host else socket.gethostname()
    listener, token = _bind(host, 0), secrets.token_hex(16)
    port = listener.getsockname()[1]
    store.set(key, f"{host} {port} {token}")
    return _Place(host, [port], token, listener)
