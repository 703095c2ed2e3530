"""What one worker adds to a decode step: receive it, hand it to torch's thread, hand back, send on.

    python bench/hop.py [--hidden 2048] [--steps 5000] [--json]

Two processes on loopback. The child is a real worker in the middle of a chain whose stage
computes nothing; this one plays its manager and its next worker with plain blocking sockets, so
that as little as possible of what is measured is the measuring. A round trip ends when the last
byte of the step is back here. The floor is the same bytes through a child that only receives and
sends: what this machine asks for waking two processes, which changes severalfold with how deeply
its cores sleep. `hop` is the difference, what the worker adds; it must stay below the limit.

On a machine that is busy with something else this measures the something else: what runs in
between empties the caches. `taskset -c 1 python bench/hop.py` takes the cores' sleep out as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measuring.machine import pinned
from proto.framing import encode_frame
from proto.messages import (
    PROTOCOL_VERSION,
    Hello,
    Lease,
    Leased,
    Message,
    Ping,
    Pong,
    Role,
    Route,
    Routed,
    Run,
    Sampling,
    Step,
    Welcome,
    WorkerFacts,
)
from proto.session import LISTENER, OPENER, Session
from proto.tls import TlsFiles, read_tls

if TYPE_CHECKING:
    from torch import Tensor

CORES: Final = sorted(os.sched_getaffinity(0))
LIMIT_US: Final = 150.0  # at p50
LEASE: Final = b"a lease of bench"
WARM_UP: Final = 500


# --- the child: a worker whose stage computes nothing ----------------------------------------


class NoStage:
    """Layers 1:2 of 3, which leave hidden states as they are."""

    model_name, fingerprint, dtype_name, device_name = "none", "none", "bfloat16", "cpu"
    start_layer, end_layer, num_layers, is_last = 1, 2, 3, False
    vocab_size, max_context, block_tokens, block_bytes = 32000, 4096, 16, 4096
    stage_bytes = read_bytes = 0
    quantize = kv_quantize = "none"

    def __init__(self, hidden_size: int) -> None:
        from engine.quantize import PackedParts

        self.hidden_size = hidden_size
        self.packed = PackedParts(None)

    def new_cache(self, num_blocks: int) -> object:
        return object()

    def forward(self, token_ids: Tensor, hidden: Tensor, runs: object, cache: object) -> Tensor:
        return hidden


def serve_worker(hidden_size: int, *tls: str) -> None:
    """`tls`: its certificate, key and authority, where links are to be encrypted."""
    from proto.keys import read_keys
    from proto.tls import tls_files
    from worker import server
    from worker.config import WorkerConfig, parse_listen

    def load(*_: object) -> Any:
        import torch

        torch.set_num_threads(1)
        return NoStage(hidden_size)

    config = WorkerConfig(
        listen=parse_listen("127.0.0.1:0"),
        layers=(1, 2),
        sections=None,
        index=None,
        keys=read_keys(None, tls_files(*map(Path, tls)) if tls else None),
    )
    server.run(config, load)


def serve_echo(num_in: int, num_out: int) -> None:
    """The floor: take `num_in` bytes, send `num_out`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(f"ready 127.0.0.1:{server.getsockname()[1]}", flush=True)
        connection, _ = server.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    space, answer = memoryview(bytearray(num_in)), bytes(num_out)
    while True:
        have = 0
        while have < num_in:
            got = connection.recv_into(space[have:])
            if not got:
                return
            have += got
        connection.sendall(answer)


# --- this process: the manager and the next worker -------------------------------------------


class Peer:
    """A session over a blocking socket; answers pings, notes when the last byte came."""

    def __init__(self, sock: socket.socket, session: Session) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(30)
        self.sock, self.session = sock, session
        self.last_byte_s = 0.0
        self._space = bytearray(1 << 20)
        self._came: list[Message] = []
        self._flush()

    def send(self, message: Message, epoch: int = 1) -> None:
        self.session.send(message, epoch=epoch)
        self._flush()

    def wait_for(self, kind: type[Message]) -> Message:
        while True:
            while self._came:
                message = self._came.pop(0)
                if isinstance(message, Ping):
                    self.send(Pong(number=message.number, clock_s=time.monotonic()))
                elif isinstance(message, kind):
                    return message
                elif not isinstance(message, Pong):
                    raise SystemExit(f"expected {kind.__name__}, got {message}")
            num_bytes = self.sock.recv_into(self._space)
            self.last_byte_s = time.perf_counter()
            if not num_bytes:
                raise SystemExit("the worker went away")
            frames = self.session.receive(memoryview(self._space)[:num_bytes])
            self._came += [frame.message for frame in frames]
            self._flush()

    def _flush(self) -> None:
        for buffer in self.session.outgoing():
            self.sock.sendall(buffer)


def measure_worker(
    hidden_size: int, num_steps: int, files: TlsFiles | None = None
) -> tuple[list[float], int, int]:
    """Round trips in microseconds, and the bytes of a step on its way in and out.

    Args:
        files: with these all links are encrypted, and both ends show the certificate.
    """
    words = () if files is None else (str(files.cert), str(files.key), str(files.ca))
    tls = None if files is None else read_tls(files)
    with (
        child("worker", str(hidden_size), *words) as address,
        socket.create_server(("127.0.0.1", 0)) as us,
    ):
        host, port = address.rsplit(":", 1)
        called = socket.create_connection((host, int(port)))
        manager = Peer(
            called if tls is None else tls.opener.wrap_socket(called, server_hostname=host),
            Session(OPENER, hello=Hello(version=PROTOCOL_VERSION, role=Role.MANAGER, agent="hop")),
        )
        welcome = manager.wait_for(Welcome)
        assert isinstance(welcome, Welcome)
        manager.send(Lease(lease=LEASE, min_blocks=1, want_blocks=4))
        manager.wait_for(Leased)
        manager.send(Route(lease=LEASE, next=f"127.0.0.1:{us.getsockname()[1]}"))
        caller = us.accept()[0]
        following = Peer(
            caller if tls is None else tls.listener.wrap_socket(caller, server_side=True),
            Session(LISTENER),
        )
        following.wait_for(Hello)
        following.send(welcome_after(welcome.worker), epoch=0)
        manager.wait_for(Routed)
        run = Run(
            sequence=1, start=15, num_tokens=1, num_blocks=1, rope_length=16, sampling=Sampling()
        )
        payload = bytes(4 + 4 + 2 * hidden_size)
        frame = b"".join(encode_frame(Step(lease=LEASE, step=1, runs=[run]), [payload], epoch=1))

        def one() -> float:
            manager.sock.sendall(frame)
            following.wait_for(Step)
            return following.last_byte_s

        times = timed(one, num_steps, each=lambda: keep_alive(manager))
        manager.sock.close()
        following.sock.close()
    # what goes on has one more float64, in compute_s
    return times, len(frame), len(frame) + 9


def keep_alive(peer: Peer) -> None:
    """Answer the pings that came meanwhile."""
    peer.sock.setblocking(False)
    try:
        num_bytes = peer.sock.recv_into(peer._space)
    except (BlockingIOError, ssl.SSLWantReadError):
        return
    finally:
        peer.sock.settimeout(30)
    for frame in peer.session.receive(memoryview(peer._space)[:num_bytes]):
        if isinstance(frame.message, Ping):
            peer.send(Pong(number=frame.message.number, clock_s=time.monotonic()))


def welcome_after(facts: WorkerFacts) -> Welcome:
    """What the next worker of the chain says."""
    following = replace(facts, start_layer=facts.end_layer, end_layer=facts.num_layers)
    return Welcome(version=PROTOCOL_VERSION, agent="hop", worker=following)


def measure_floor(num_in: int, num_out: int, num_steps: int) -> list[float]:
    """The same bytes through a child that does nothing with them."""
    with child("echo", str(num_in), str(num_out)) as address:
        host, port = address.rsplit(":", 1)
        sock = socket.create_connection((host, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        frame, space = bytes(num_in), bytearray(1 << 20)

        def one() -> float:
            sock.sendall(frame)
            have = 0
            while have < num_out:
                have += sock.recv_into(space)
            return time.perf_counter()

        times = timed(one, num_steps, each=lambda: None)
        sock.close()
    return times


def timed(one: Callable[[], float], num_steps: int, each: Callable[[], None]) -> list[float]:
    """Microseconds of each call after a warm-up, sorted."""
    times = []
    for _ in range(num_steps + WARM_UP):
        begun_s = time.perf_counter()
        times.append((one() - begun_s) * 1e6)
        each()
    return sorted(times[WARM_UP:])


class child:
    """This file in another process, in one of its roles; gives the address it printed."""

    def __init__(self, *role: str) -> None:
        # On another core than who asks: two processes on one wake each other ten times as fast.
        with pinned({CORES[-1]}):
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", *role],
                stdout=subprocess.PIPE,
                text=True,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        os.sched_setaffinity(0, {CORES[0]})

    def __enter__(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()[1]

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, bfloat16")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        role, *numbers = args.child
        if role == "worker":
            serve_worker(int(numbers[0]), *numbers[1:])
        else:
            serve_echo(int(numbers[0]), int(numbers[1]))
        return
    trips, num_in, num_out = measure_worker(args.hidden, args.steps)
    floor = measure_floor(num_in, num_out, args.steps)
    hop_us = round(percentile(trips, 50) - percentile(floor, 50), 1)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "hidden_size": args.hidden,
        "frame_bytes": num_in,
        "steps": args.steps,
        "round_trip_us": {"p50": percentile(trips, 50), "p95": percentile(trips, 95)},
        "floor_us": {"p50": percentile(floor, 50), "p95": percentile(floor, 95)},
        "hop_us": {"p50": hop_us},
        "limit_us": LIMIT_US,
        "within_limit": hop_us <= LIMIT_US,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    sys.exit(0 if result["within_limit"] else 1)


def percentile(ordered: list[float], percent: int) -> float:
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1)


def print_table(result: dict[str, object]) -> None:
    print(f"one hop of a decode step, hidden size {result['hidden_size']}, ", end="")
    print(f"{result['frame_bytes']} bytes a frame, {result['steps']} steps; {result['machine']}")
    print(f"{'':14}{'p50':>10}{'p95':>10}  microseconds")
    for key in ("round_trip_us", "floor_us", "hop_us"):
        values = result[key]
        assert isinstance(values, dict)
        name = key.removesuffix("_us").replace("_", " ")
        p95 = values.get("p95", "")
        print(f"{name:14}{values['p50']:>10}{p95:>10}")
    verdict = "within" if result["within_limit"] else "OVER"
    print(f"the hop's p50 is {verdict} the limit of {result['limit_us']} microseconds")


if __name__ == "__main__":
    main()
