"""The adapters that a worker holds: loaded, listed, used by leases, dropped.

Everybody may use what was given at the start or kept since. What a link has added and not kept is
its own and goes with it, so that a manager that dies halfway leaves nothing behind. A dropped one
is nobody's any more at once; its memory is freed when the last lease lets it go. Runs on the event
loop; files are read on a thread of their own, and torch's thread only tries what came of it. Knows
the wire's words for adapters; opens no link.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from proto.adapter_name import is_adapter_name
from proto.errors import AdapterError, Error
from proto.link import Link
from proto.messages import (
    MAX_ADAPTER_PATH_CHARS,
    MAX_ADAPTERS,
    MAX_REASON_CHARS,
    AdapterDone,
    AdapterFacts,
    AdapterRefused,
    AddAdapter,
)
from worker.answers import answer
from worker.compute import Compute
from worker.logs import fields
from worker.memory import is_out_of_memory

if TYPE_CHECKING:
    from engine.adapter_files import AdapterFiles
    from engine.lora_layers import Adapter
    from engine.stage import Stage
    from worker.leases import OpenLease

log = logging.getLogger("comboio.worker")


@dataclass(slots=True, eq=False)
class HeldAdapter:
    """One adapter in memory."""

    name: str
    path: str
    adapter: Adapter
    owner: Link | None = None  # who added it and has not kept it yet; None: it is everybody's
    num_leases: int = 0

    @property
    def facts(self) -> AdapterFacts:
        """What the wire says of it."""
        return AdapterFacts(
            name=self.name,
            path=self.path,
            fingerprint=self.adapter.fingerprint,
            num_bytes=self.adapter.num_bytes,
            num_modules=len(self.adapter.layers),
            leases=self.num_leases,
        )


class Adapters:
    """All adapters of one worker."""

    def __init__(self, stage: Stage, compute: Compute, *, why_closed: str | None = None) -> None:
        """Begin with none.

        Args:
            compute: torch's thread.
            why_closed: why nobody may add, keep or drop one over a link; None: managers may.
        """
        self._stage, self._compute = stage, compute
        self._why_closed = why_closed
        self._reading: Compute | None = None  # the thread for files, once there is one
        self._shared: dict[str, HeldAdapter] = {}
        self._own: dict[tuple[Link, str], HeldAdapter] = {}
        self._leaving: set[HeldAdapter] = set()  # dropped, and still used
        self._adding: dict[tuple[Link, str], asyncio.Task[None]] = {}

    @property
    def listed(self) -> list[AdapterFacts]:
        """Those that everybody may use, by name."""
        return [self._shared[name].facts for name in sorted(self._shared)]

    @property
    def count(self) -> int:
        """How many are in memory."""
        return len(self._shared) + len(self._own) + len(self._leaving)

    @property
    def num_bytes(self) -> int:
        """What they take there."""
        return sum(held.adapter.num_bytes for held in self._all())

    def share(self, held: HeldAdapter) -> None:
        """One that was loaded at the start."""
        self._shared[held.name] = held

    # --- what managers ask -------------------------------------------------------------------

    def add(self, link: Link, asked: AddAdapter) -> None:
        """Load one for a link alone; the answer comes when it is loaded."""
        key = (link, asked.name)
        refusal = self._objection_to(link, asked)
        if refusal is not None:
            self._refuse(link, asked.name, refusal)
            return
        self._adding[key] = asyncio.get_running_loop().create_task(self._add(link, asked))

    def keep(self, link: Link, name: str) -> None:
        """What the link has added becomes everybody's."""
        held = self._own.get((link, name))
        if held is None:
            self._refuse(link, name, f"this link has added no adapter {name}")
        elif name in self._shared:
            self._refuse(link, name, self._is_there(name))
        else:
            del self._own[link, name]
            held.owner = None
            self._shared[name] = held
            log.info("adapter added", extra=_fields(held))
            answer(link, AdapterDone(adapter=held.facts))

    def drop(self, link: Link, name: str) -> None:
        """Nobody new may use it."""
        held = self._own.pop((link, name), None)
        if held is None:
            if self._why_closed is not None:
                self._refuse(link, name, self._why_closed)
                return
            held = self._shared.pop(name, None)
        if held is None:
            self._refuse(link, name, self._is_missing(name))
            return
        self._let_go(held)
        answer(link, AdapterDone(adapter=held.facts))

    def use(self, link: Link, lease: OpenLease, number: int, name: str) -> None:
        """From now on, runs of the lease may have this number."""
        held = self._own.get((link, name)) or self._shared.get(name)
        if held is None:
            self._refuse(link, name, self._is_missing(name))
        elif number in lease.adapters:
            self._refuse(link, name, f"number {number} means another adapter in this lease")
        elif len(lease.adapters) >= MAX_ADAPTERS:
            self._refuse(link, name, f"this lease uses {MAX_ADAPTERS} adapters, no more can be")
        else:
            lease.adapters[number] = held
            held.num_leases += 1
            answer(link, AdapterDone(adapter=held.facts))

    def release(self, lease: OpenLease, numbers: Iterable[int]) -> None:
        """No run of the lease has these numbers any more; unknown ones do no harm."""
        for number in tuple(numbers):
            held = lease.adapters.pop(number, None)
            if held is not None:
                held.num_leases -= 1
                if held in self._leaving and not held.num_leases:
                    self._free(held)

    def link_closed(self, link: Link) -> None:
        """What it added for itself goes with it."""
        for key, task in tuple(self._adding.items()):
            if key[0] is link:
                task.cancel()
        for key, held in tuple(self._own.items()):
            if key[0] is link:
                del self._own[key]
                self._let_go(held)

    async def stop(self, deadline_s: float) -> bool:
        """Give up what is being loaded; False if a file is still being read at the deadline."""
        for task in tuple(self._adding.values()):
            task.cancel()
        reading, self._reading = self._reading, None
        return reading is None or await reading.stop(deadline_s)

    # --- inside ------------------------------------------------------------------------------

    def _all(self) -> list[HeldAdapter]:
        return [*self._shared.values(), *self._own.values(), *self._leaving]

    def _objection_to(self, link: Link, asked: AddAdapter) -> str | None:
        name = asked.name
        if self._why_closed is not None:
            return self._why_closed
        if not is_adapter_name(name):
            return f"{name!r} cannot be an adapter's name"
        if not asked.path.isprintable():
            return f"the adapter's folder {asked.path!r} has characters that no path should have"
        if name in self._shared:
            return self._is_there(name)
        if (link, name) in self._own or (link, name) in self._adding:
            return f"this link is adding an adapter {name} already"
        if self.count + len(self._adding) >= MAX_ADAPTERS:
            return f"{self.count} adapters are held here, no more can be: drop one first"
        if not _is_absolute(asked.path):
            return f"the adapter's folder {asked.path} is not an absolute path"
        return None

    async def _add(self, link: Link, asked: AddAdapter) -> None:
        try:
            held = await self._load(asked.name, asked.path)
        except AdapterError as exc:
            self._refuse(link, asked.name, str(exc))
        except Exception as exc:  # torch says "no memory" in several classes
            self._refuse(link, asked.name, _reason(exc, asked.path))
        else:
            held.owner = link
            self._own[link, asked.name] = held
            answer(link, AdapterDone(adapter=held.facts))
        finally:
            self._adding.pop((link, asked.name), None)

    async def _load(self, name: str, path: str) -> HeldAdapter:
        from engine.adapters import check_adapter

        if self._reading is None:
            self._reading = Compute(asyncio.get_running_loop(), "adapter files")
        files, adapter = await self._reading.call(partial(_read, path, self._stage))
        await self._compute.call(partial(check_adapter, adapter, self._stage, files))
        return HeldAdapter(name, shown_path(path), adapter)

    def _let_go(self, held: HeldAdapter) -> None:
        if held.num_leases:
            self._leaving.add(held)
            log.info("adapter dropped, and still used", extra=_fields(held))
        else:
            self._free(held)

    def _free(self, held: HeldAdapter) -> None:
        self._leaving.discard(held)
        log.info("adapter freed", extra=_fields(held))

    def _refuse(self, link: Link, name: str, reason: str) -> None:
        log.info("adapter refused", extra=fields(name=name, peer=link.peer, reason=reason))
        reason = " ".join(reason.split()).rstrip(".")[:MAX_REASON_CHARS]
        answer(link, AdapterRefused(name=name, reason=reason))

    def _is_there(self, name: str) -> str:
        return (
            f"an adapter {name} is here already ({self._shared[name].path}): drop it first, or "
            "take another name"
        )

    def _is_missing(self, name: str) -> str:
        known = ", ".join(sorted(self._shared)) or "none"
        return (
            f"there is no adapter {name} here (held: {known}): add it with `manager adapters add "
            f"{name}=DIR`, or start the worker with --adapter {name}=DIR"
        )


def load_adapters(adapters: Iterable[tuple[str, str]], stage: Stage) -> list[HeldAdapter]:
    """Those that a worker begins with, on torch's thread.

    Raises:
        AdapterError: one is missing, damaged, or of another model; says which by name.
        Error: there is not enough memory.
    """
    from engine.adapters import load_adapter

    loaded = []
    for name, path in adapters:
        try:
            adapter = load_adapter(path, stage)
        except AdapterError as exc:
            raise AdapterError(f"--adapter {name}: {exc}") from exc
        except Exception as exc:
            if is_out_of_memory(exc):
                raise Error(f"--adapter {name}: {_reason(exc, path)}.") from exc
            raise
        held = HeldAdapter(name, shown_path(path), adapter)
        log.info("adapter loaded", extra=_fields(held))
        loaded.append(held)
    return loaded


def check_adapter_files(adapters: Iterable[tuple[str, str]]) -> None:
    """See whether there are adapters at all, of a kind that can be served.

    Raises:
        AdapterError: one is not there, or of another kind; says which by name.
    """
    from engine.adapter_files import AdapterFiles

    for name, path in adapters:
        try:
            AdapterFiles(path)
        except AdapterError as exc:
            raise AdapterError(f"--adapter {name}: {exc}") from exc


def shown_path(path: str) -> str:
    """As tables show it: whole, unless it is longer than the wire takes."""
    whole = str(Path(path).expanduser().resolve())
    return whole if len(whole) <= MAX_ADAPTER_PATH_CHARS else whole[-MAX_ADAPTER_PATH_CHARS:]


def _is_absolute(path: str) -> bool:
    """Also of the home folder of a user; there may be no such user."""
    try:
        return Path(path).expanduser().is_absolute()
    except RuntimeError:
        return False


def _read(path: str, stage: Stage) -> tuple[AdapterFiles, Adapter]:
    from engine.adapter_files import AdapterFiles
    from engine.adapters import read_adapter

    files = AdapterFiles(path)
    return files, read_adapter(files, stage.places, stage.device)


def _reason(exc: Exception, path: str) -> str:
    text = " ".join(str(exc).split()) or type(exc).__name__
    if is_out_of_memory(exc):
        return f"there is not enough memory for the adapter {path}: {text}"
    return f"the adapter {path} cannot be loaded: {type(exc).__name__}: {text}"


def _fields(held: HeldAdapter) -> dict[str, object]:
    return fields(
        adapter=held.name,
        path=held.path,
        bytes=held.adapter.num_bytes,
        modules=len(held.adapter.layers),
        leases=held.num_leases,
    )


NOT_OVER_LINKS: Final = (
    "this worker listens to other machines without a secret (--insecure), so nobody may add or "
    "drop its adapters over a link: start it with --adapter NAME=DIR, or with --secret-file"
)
