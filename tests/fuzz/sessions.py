"""Whole sessions against real workers, from a peer that knows the secret and keeps no rule.

While they go on, an honest manager's tokens must stay what they were, and afterwards the workers
must serve as before. By hand: `python -m tests.fuzz.sessions --minutes 60`. The seed of a session
is its number: one that fails is played again with `--first N --count 1`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from proto.messages import (
    AdapterDone,
    Adapters,
    AdaptersRequest,
    AddAdapter,
    DropAdapter,
    KeepAdapter,
    Message,
    Role,
    Status,
    StatusRequest,
    Step,
    StepDone,
)
from tests.fuzz.honest import Honest
from tests.fuzz.raw_peer import Peer, announcing, frame_of
from tests.fuzz.session_scripts import Act, Leave, Open, Say, World, damaged, interleaved, sound
from tests.support.adapters import adapted
from tests.support.models import save_tiny, tiny_model
from tests.support.processes import WorkerProcess
from tests.support.wire import open_link, told

SECRET = b"a secret of more than sixteen bytes"
AT_ONCE = 8
# A sound message is answered at once; what was damaged perhaps never.
ANSWER_S, PATIENCE_S = 60.0, 0.2
HONEST_S = 120.0
# What the workers may have grown by when all is over. Frames and steps on their way are bounded
# by far more, but nothing here sends that much.
GROWTH_BYTES = 192 * 2**20
# Words of a worker that met something nobody had thought of.
STUMBLES = ("internal error", "Traceback")


@dataclass
class Told:
    """What was done, and what came of it."""

    sessions: int = 0
    damaged: int = 0
    messages: int = 0
    cut_off: int = 0  # links that the worker ended with a reason
    steps_done: int = 0
    honest_rounds: int = 0
    reroutes: int = 0  # of the honest one, whose workers took each other for dead

    def __str__(self) -> str:
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in vars(self).items())


class Fuzzer:
    """Two workers, an honest manager of both, and as many rude ones as one likes."""

    def __init__(self, workers: list[WorkerProcess], model: Any, folder: Path) -> None:
        self.told = Told()
        self.reasons: Counter[str] = Counter()
        self._workers, self._model = workers, model
        self._honest_adapter, self._adapter = str(folder / "honest"), str(folder / "other")
        self._addresses = [worker.address for worker in workers]
        self._honest: Honest
        self._world: World
        self._expected: dict[int, list[int]]
        self._rss_bytes: list[int] = []

    async def run(self, first: int, count: int) -> None:
        """So many sessions, from a number on; raises AssertionError with the seed of a failure."""
        async with self._beside():
            numbers = iter(range(first, first + count))
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._play_all(numbers))
        await self._look_after()

    # --- the honest one ------------------------------------------------------------------------

    @asynccontextmanager
    async def _beside(self) -> AsyncIterator[None]:
        """An honest manager generates as long as this is open."""
        await self._meet()
        stop = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._generate_until(stop))
        try:
            yield
        finally:
            stop.set()
            await task
            self.told.reroutes += self._honest.num_reroutes
            await self._honest.close()

    async def _meet(self) -> None:
        self._honest = await Honest.open(self._addresses, self._model, SECRET, "honest")
        welcomes = [link.welcome for link in self._honest.links]
        assert welcomes[0] is not None
        facts = welcomes[0].worker
        self._world = World(
            addresses=(self._addresses[0], self._addresses[1]),
            fingerprint=facts.fingerprint,
            num_layers=facts.num_layers,
            hidden_size=facts.hidden_size,
            vocab_size=facts.vocab_size,
            adapter_path=self._adapter,
            honest_lease=self._honest.lease,
        )
        tokens = await self._honest.generate()
        if not self._rss_bytes:
            self._expected = tokens
            self._rss_bytes = self._rss()
        assert tokens == self._expected, "other tokens than when nobody disturbed"

    async def _generate_until(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            async with asyncio.timeout(HONEST_S):
                tokens = await self._honest.generate()
            assert tokens == self._expected, "another manager's tokens have changed"
            self.told.honest_rounds += 1

    # --- the rude ones -------------------------------------------------------------------------

    async def _play_all(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            try:
                await self._session(number)
            except Exception as exc:
                raise AssertionError(f"session {number} failed: {exc!r}") from exc

    async def _session(self, number: int) -> None:
        dice = random.Random(number)
        script = sound(dice, self._world)
        if dice.random() < 0.3:
            script = interleaved(dice, script, sound(dice, self._world, first_link=2))
        is_sound = dice.random() < 0.1
        if not is_sound:
            script = damaged(dice, self._world, script)
            self.told.damaged += 1
        peers: dict[int, Peer] = {}
        try:
            for act in script:
                await self._play(act, peers, ANSWER_S if is_sound else PATIENCE_S)
        finally:
            for peer in peers.values():
                await peer.close()
        self._judge(peers.values())
        self.told.sessions += 1

    async def _play(self, act: Act, peers: dict[int, Peer], patience_s: float) -> None:
        if isinstance(act, Open):
            if (old := peers.pop(act.link, None)) is not None:
                await old.close()
            address = self._world.addresses[act.worker]
            peers[act.link] = await Peer.open(address, act.role, act.lease, SECRET)
        elif act.link in peers and isinstance(act, Say):
            await self._say(act, peers, patience_s)
        elif act.link in peers and isinstance(act, Leave):
            getattr(peers[act.link], act.how)()

    async def _say(self, act: Say, peers: dict[int, Peer], patience_s: float) -> None:
        peer = peers[act.link]
        answering = peers.get(act.link if act.until_on is None else act.until_on, peer)
        before = len(answering.said)
        try:
            frame = frame_of(act.message, act.payload, act.epoch)
        except (OverflowError, UnicodeEncodeError):  # msgpack itself has no such value
            return
        if act.announces is not None:
            frame = announcing(Step.TAG, 0, act.announces) + bytes(1000)
        peer.say(frame[: act.cut])
        self.told.messages += 1
        if act.until:
            is_answered = await answering.until(
                lambda: any(isinstance(it, act.until) for it in answering.said[before:]),
                patience_s,
            )
            assert is_answered or patience_s != ANSWER_S, f"no answer to {act}"

    def _judge(self, peers: Any) -> None:
        for peer in peers:
            self.told.cut_off += bool(peer.goodbye)
            self.told.steps_done += sum(isinstance(it, StepDone) for it in peer.said)
            for message in peer.said:
                words = str(message)
                assert not any(it in words for it in STUMBLES), f"a worker said {words[:500]}"
            if peer.goodbye:
                self.reasons[peer.goodbye[:60]] += 1

    # --- afterwards ----------------------------------------------------------------------------

    async def _look_after(self) -> None:
        """All that was taken is free again, nothing was said that should not be, and it works."""
        for worker in self._workers:
            assert worker.process.poll() is None, f"a worker ended; it said:\n{worker.stderr}"
            said = worker.stderr
            assert not any(it in said for it in STUMBLES), said[-5000:]
            await self._tidy(worker)
        honest = await Honest.open(self._addresses, self._model, SECRET, None)
        await honest.generate()
        await honest.close()
        growth = [now - then for now, then in zip(self._rss(), self._rss_bytes, strict=True)]
        assert max(growth) < GROWTH_BYTES, f"the workers have grown by {growth} bytes"

    async def _tidy(self, worker: WorkerProcess) -> None:
        link = await open_link(worker.address, Role.MANAGER, secret=SECRET)
        await link.ping(timeout_s=30.0)
        link.send(AdaptersRequest())
        names = {adapter.name for adapter in (await told(link, Adapters)).adapters}
        asked: list[Message] = [DropAdapter(name=name) for name in names - {"honest"}]
        if "honest" not in names:  # somebody dropped it, as managers may
            asked += [AddAdapter(name="honest", path=self._honest_adapter)]
            asked += [KeepAdapter(name="honest")]
        for message in asked:
            link.send(message)
            await told(link, AdapterDone)
        async with asyncio.timeout(60):
            while True:
                link.send(StatusRequest())
                status = await told(link, Status)
                if status.leases == 0 and status.adapters == 1:
                    break
                await asyncio.sleep(0.01)  # those who were cut off are heard of soon
        assert status.free_blocks == status.total_blocks
        await link.close()

    def _rss(self) -> list[int]:
        return [psutil.Process(worker.pid).memory_info().rss for worker in self._workers]


@contextmanager
def two_workers(folder: Path) -> Iterator[Fuzzer]:
    """A chain of two on a tiny model, with a secret and an adapter."""
    save_tiny("llama", folder / "model")
    adapted(tiny_model("llama"), folder / "honest", seed=1)
    adapted(tiny_model("llama"), folder / "other", seed=2, target_modules=["q_proj"])
    (folder / "secret").write_bytes(SECRET)
    (folder / "secret").chmod(0o600)
    words = ("--model", str(folder / "model"), "--sections", "2", "--kv-memory", "2MiB")
    words += ("--secret-file", str(folder / "secret"), "--log-level", "warning")
    words += ("--adapter", f"honest={folder / 'honest'}")
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(WorkerProcess(*words, "--index", str(index), wait=False))
            for index in range(2)
        ]
        for worker in workers:
            worker.wait_until_ready()
        yield Fuzzer(workers, tiny_model("llama"), folder)


def main() -> None:
    """Play sessions for a number of them or of minutes, and say how many there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=0.0)
    asked = parser.parse_args()
    end_s = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory() as folder, two_workers(Path(folder)) as fuzzer:
        first = asked.first
        while True:
            asyncio.run(fuzzer.run(first, asked.count))
            first += asked.count
            print(fuzzer.told, flush=True)
            if time.monotonic() >= end_s:
                break
        for reason, count in fuzzer.reasons.most_common(40):
            print(f"{count:6} {reason}")


if __name__ == "__main__":
    main()
