"""Know at once that a rank of a run has died, and end the others, with one sentence for people.

Every rank keeps one connection to the first one. A rank that ends in an error says why over it; one
that is killed says nothing, and the connection breaks. The first rank speaks for all and then lets
all leave with the same exit code; where it died itself, the next one speaks. Knows no
training and no launcher.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from manager.finetune.ranks_link import GRACE_S, JOIN_S, Link, LostError, Member, find, greet
from proto.errors import Error

# For the first rank to say its last words, once the others know that it is over.
LAST_WORDS_S: Final = 10.0
EXIT_DIED: Final = 1
CHECK_S: Final = 0.2  # while ranks are awaited


class Watch:
    """What both ends have in common: who speaks, and how a process leaves."""

    def __init__(self, me: Member, num_ranks: int) -> None:
        self.me, self.num_ranks = me, num_ranks
        self.members: list[Member] = [me]
        self.log_of: Callable[[int], str] = lambda _: "its log is what the launcher wrote"
        self._speaking = threading.Lock()
        self._is_over = threading.Event()
        self._stderr = os.dup(2)  # before it is led to a file

    @property
    def hosts(self) -> tuple[str, ...]:
        """Of each rank."""
        return tuple(it.host for it in self.members)

    def name(self, rank: int) -> str:
        """`rank 3 on node2`."""
        host = self.members[rank].host if rank < len(self.members) else "?"
        return f"rank {rank} on {host}"

    def died(self, rank: int) -> str:
        """The sentence for a rank that ended without a word."""
        pid = self.members[rank].pid if rank < len(self.members) else "?"
        return (
            f"{self.name(rank)} (process {pid}) died without a word, and the run with it; "
            f"{self.log_of(rank)}. A kernel that ran out of memory kills so. --resume goes on "
            "from the last checkpoint"
        )

    def _leave(self, code: int) -> None:
        """Now, whatever the main thread is waiting for."""
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            pass
        os._exit(code)

    def _say(self, sentence: str) -> None:
        line = "manager: " + " ".join(sentence.split()) + "\n"
        try:
            os.write(self._stderr, line.encode())
        except OSError:
            pass  # nobody reads it; the exit code still tells


class Hub(Watch):
    """The first rank's end."""

    def __init__(
        self,
        me: Member,
        num_ranks: int,
        listener: socket.socket | None,
        token: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Wait for the others.

        Args:
            listener: bound; None where there are no others. Closed when all are here.
            token: what a rank of this run says first.
            check: asked now and then while it waits; raises if some will not come.
        Raises:
            LostError: not all of them came.
        """
        super().__init__(me, num_ranks)
        self._links: dict[int, Link] = {}
        if listener is not None:
            with listener:
                self._wait_for_all(listener, token, check)

    def start(self, facts: dict[str, Any]) -> None:
        """Tell the others who is there, with some facts; watch them once they took these in.

        Raises:
            LostError: one of them left.
        """
        everybody = [[it.rank, it.host, it.pid, it.local_rank] for it in self.members]
        for link in self._links.values():
            link.send({"members": everybody, **facts})
        for rank, link in self._links.items():
            said = link.receive(JOIN_S)
            if said is None or "failed" in said:
                reason = f": {said['failed']}" if said else " before the run began"
                raise LostError(f"{self.name(rank)} left{reason}")
        for rank, link in self._links.items():
            threading.Thread(target=self._hear, args=(rank, link), daemon=True).start()

    def speak(self, code: int) -> None:
        """The main thread is about to say what went wrong: let the others leave with its code.

        Where another rank's end is being told already, this never returns.
        """
        if not self._speaking.acquire(blocking=False):
            threading.Event().wait()
        self._dismiss(code)

    def wait_for_reason(self) -> None:
        """Something broke that may only follow from a rank's death: give that time to be told."""
        self._is_over.wait(GRACE_S)
        if self._speaking.locked():
            threading.Event().wait()

    def finish(self) -> None:
        """All went well."""
        self.speak(0)

    def _wait_for_all(self, listener: socket.socket, token: str, check: Callable[[], None]) -> None:
        give_up_s = time.monotonic() + JOIN_S
        listener.listen(self.num_ranks)
        listener.settimeout(CHECK_S)
        found: dict[int, Member] = {}
        while len(found) < self.num_ranks - 1:
            check()
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if time.monotonic() < give_up_s:
                    continue
                missing = sorted(set(range(1, self.num_ranks)) - set(found))
                raise LostError(
                    f"{len(found) + 1} of {self.num_ranks} ranks came within {JOIN_S:.0f} s; "
                    f"{', '.join(map(str, missing[:8]))} did not: see what the launcher wrote of "
                    "them, and whether all nodes reach this one"
                ) from None
            link = Link(connection)
            member = greet(link, token)
            if member is None or not 0 < member.rank < self.num_ranks or member.rank in found:
                link.close()  # a stranger
                continue
            found[member.rank], self._links[member.rank] = member, link
        self.members = [self.me, *(found[rank] for rank in sorted(found))]

    def _hear(self, rank: int, link: Link) -> None:
        said = link.receive()
        if self._is_over.is_set():
            return
        if said is not None and "failed" in said:
            # All ranks may fail alike; the first one's own words are then the better ones.
            if self._is_over.wait(GRACE_S):
                return
            self._end(f"{self.name(rank)}: {said['failed']} ({self.log_of(rank)})", said["code"])
        elif said is None:
            self._end(self.died(rank), EXIT_DIED)

    def _end(self, sentence: str, code: int) -> None:
        if not self._speaking.acquire(blocking=False):
            return
        self._say(sentence)
        self._dismiss(code)
        self._leave(code)

    def _dismiss(self, code: int) -> None:
        self._is_over.set()
        for link in self._links.values():
            link.send({"leave": code})


class Spoke(Watch):
    """Any other rank's end."""

    def __init__(
        self, me: Member, num_ranks: int, addresses: Sequence[tuple[str, int]], token: str
    ) -> None:
        """Find the first rank.

        Args:
            addresses: where it may be; tried in turn until one of them knows the token.
        Raises:
            LostError: it is at none of them.
        """
        super().__init__(me, num_ranks)
        self._link = find(addresses, token, me)
        self.peer: str = self._link.peer

    def start(self) -> dict[str, Any]:
        """Wait until all ranks are there; returns the first one's facts.

        Raises:
            Error: the first rank left, and said why.
        """
        facts = self._link.receive(JOIN_S + GRACE_S)
        if facts is None or "members" not in facts:
            raise Error("rank 0 left before all ranks were there")
        self.members = [
            Member(rank=rank, host=host, pid=pid, local_rank=local_rank)
            for rank, host, pid, local_rank in facts["members"]
        ]
        return facts

    def watch(self) -> None:
        """All that the first rank offered is taken: from now on know when it is gone."""
        self._link.send({"ready": True})
        threading.Thread(target=self._hear, daemon=True).start()

    def fail(self, sentence: str, code: int) -> None:
        """Say why this rank cannot go on, and end when the first one has said it."""
        self._link.send({"failed": sentence, "code": code})
        if self._is_over.wait(3 * GRACE_S):
            threading.Event().wait(2 * LAST_WORDS_S)  # whoever hears the first rank leaves
        self._leave(code)

    def wait_for_reason(self) -> None:
        """Something broke that may only follow from another rank's end: then leave with it."""
        if self._is_over.wait(GRACE_S):
            threading.Event().wait(2 * LAST_WORDS_S)

    def finish(self) -> None:
        """This rank is done: wait until the first one is."""
        self._link.send({"done": True})
        self._is_over.wait()

    def _hear(self) -> None:
        said = self._link.receive()
        self._is_over.set()
        if said is None:
            if self._speaks_for_the_first():
                self._say(self.died(0))
            self._leave(EXIT_DIED)
            return
        # torch tells at length that the first rank's store is gone; that is no news any more.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        # A launcher ends all others when one leaves with an error: the first rank speaks before.
        self._link.receive(LAST_WORDS_S)
        self._leave(int(said.get("leave", EXIT_DIED)))

    def _speaks_for_the_first(self) -> bool:
        """Rank 1; a little later, as all of a host may be gone, the first of another host."""
        first_host = self.members[0].host
        elsewhere = [it.rank for it in self.members if it.host != first_host]
        if self.me.rank == 1:
            return True
        if elsewhere and self.me.rank == elsewhere[0]:
            time.sleep(GRACE_S)  # rank 1's launcher has ended us, if rank 1 was there to speak
            return True
        return False
