"""Which adapters the requests of one pipeline use, and what they are called on the wire.

An adapter is announced to all workers when its first request comes, under a number that the runs
of its requests carry, and let go when the last one is over. Knows links and the lease; no request.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from manager.adapter_loading import all_of, check_same, gather_all, load_everywhere
from manager.asked_once import AskedOnce, has_failed
from manager.event_loop import hear, in_background
from manager.links import Refusal, WorkerLink
from proto.adapter_name import is_adapter_name
from proto.errors import AdapterError, RequestRefused
from proto.messages import MAX_ADAPTER_PATH_CHARS, AdapterFacts, AddAdapter, UseAdapter

TRAINED_FOLDER: Final = "lora_adapters"  # within the folder of every run
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclass(slots=True, eq=False)
class AdapterUse:
    """One adapter while requests use it."""

    name: str
    number: int  # of it within the lease
    announced: asyncio.Task[AdapterFacts]  # to all workers; what the first says of it
    num_requests: int = 0

    @property
    def fingerprint(self) -> str:
        """Of the adapter, which is the same on all workers."""
        return self.announced.result().fingerprint

    @property
    def path(self) -> str:
        """Its folder, where the first worker has it."""
        return self.announced.result().path

    @property
    def is_known(self) -> bool:
        """Whether all workers of a chain knew it."""
        return self.announced.done() and not has_failed(self.announced)


class AdapterBook:
    """The adapters of one pipeline."""

    def __init__(self, links: Sequence[WorkerLink], lease: bytes) -> None:
        self._links, self._lease = links, lease
        self._numbers = count(1)
        self._uses: dict[str, AdapterUse] = {}
        self._names: dict[str, str] = {}  # what requests say -> what the workers call it
        self._loaded: dict[str, str] = {}  # for this pipeline only: name -> folder
        self._own: set[tuple[WorkerLink, str]] = set()  # who has loaded such a one
        self._adding: AskedOnce[AdapterFacts] = AskedOnce()  # by name
        self._using: AskedOnce[AdapterFacts] = AskedOnce()  # by number
        self.fingerprints: dict[str, str] = {}  # of what was provided, by what requests say

    # --- before requests ---------------------------------------------------------------------

    async def provide(self, wanted: Collection[str]) -> None:
        """See that requests can say each of these: names, folders, or NAME=DIR.

        A folder that the workers do not hold yet is loaded on all of them, for this pipeline only.

        Raises:
            AdapterError: there is no such adapter, or a worker cannot load it.
            WorkerLost: a worker does not answer.
        """
        if not wanted:
            return
        held = await held_everywhere(self._links)
        for said in wanted:
            facts = await self._provide(said, held)
            self._names[said], self.fingerprints[said] = facts.name, facts.fingerprint

    async def _provide(self, said: str, held: dict[str, list[AdapterFacts]]) -> AdapterFacts:
        if said in held and is_adapter_name(said):
            if len(held[said]) == len(self._links):
                check_same(self._links, held[said])
                return held[said][0]
            raise AdapterError(await self._who_lacks(said))
        folder = folder_of(said)
        if folder is None:
            known = ", ".join(sorted(held)) or "none"
            raise AdapterError(
                f"--adapter {said}: the workers hold no adapter of this name (held: {known}), and "
                f"there is no folder of it here; add it with `manager adapters add {said}=DIR`."
            )
        fingerprint = await in_background(_fingerprint, folder)
        for known_facts in held.values():
            if len(known_facts) == len(self._links) and {it.fingerprint for it in known_facts} == {
                fingerprint
            }:
                return known_facts[0]
        name = f"{name_for(folder)}.{secrets.token_hex(4)}"
        links = self._links
        loaded = (await load_everywhere(links, name, wire_path(folder)))[0]
        self._loaded[name] = wire_path(folder)
        self._own.update((link, name) for link in links)
        if fingerprint is not None and loaded.fingerprint != fingerprint:
            raise AdapterError(
                f"--adapter {said}: the workers have another adapter in {folder} than this "
                "machine; put the same files on all machines."
            )
        return loaded

    async def _who_lacks(self, name: str) -> str:
        for link in self._links:
            if all(it.name != name for it in await link.adapters()):
                return (
                    f"--adapter {name}: worker {link.address} does not hold it, though others "
                    f"do; add it there with `manager adapters add {name}=DIR --workers "
                    f"{link.address}`."
                )
        return f"--adapter {name}: try again, it was being added"

    # --- requests ----------------------------------------------------------------------------

    async def acquire(self, said: str) -> AdapterUse:
        """Have an adapter for one more request; `release` ends that.

        Raises:
            RequestRefused: a worker does not hold it, or another one under this name.
            WorkerLost: a worker does not answer.
        """
        name = self._names.get(said, said)
        use = self._uses.get(name)
        if use is None:
            if not is_adapter_name(name):
                raise RequestRefused(f"{name[:80]!r} is no adapter's name.")
            number = next(self._numbers)
            announced = asyncio.ensure_future(self._announce(name, number))
            announced.add_done_callback(hear)
            use = self._uses[name] = AdapterUse(name, number, announced)
        use.num_requests += 1
        try:
            # Others may wait for it as well: who gives up does not take it from them.
            await asyncio.shield(use.announced)
        except BaseException as exc:
            self.release(use)
            if isinstance(exc, AdapterError):
                raise RequestRefused(str(exc)) from exc
            raise
        return use

    def release(self, use: AdapterUse) -> None:
        """One request less; the last one lets the workers know."""
        use.num_requests -= 1
        if use.num_requests:
            return
        if self._uses.get(use.name) is use:
            del self._uses[use.name]
        self._using.forget(lambda _, number: number == use.number)
        for link in self._links:
            link.release_adapter(self._lease, use.number)

    async def follow(self, links: Sequence[WorkerLink]) -> None:
        """The chain is to be another: let its newcomers have what requests use.

        Raises:
            Refusal: one of them cannot, or holds another adapter of that name.
            WorkerLost: a worker does not answer.
        """
        self._links = links
        for void in (self._adding, self._using):
            void.forget(lambda link, _: not link.is_open)
        self._own = {(link, name) for link, name in self._own if link.is_open}
        for link in links:
            await self._teach(link)

    def lease_ended(self, link: WorkerLink) -> None:
        """This worker has no lease of ours any more: numbers mean nothing to it."""
        self._using.forget(lambda other, _: other is link)

    def forget(self, link: WorkerLink) -> None:
        """This worker begins anew: what it held for us is gone, and our lease with it."""
        self.lease_ended(link)
        self._adding.forget(lambda other, _: other is link)
        self._own = {(other, name) for other, name in self._own if other is not link}

    async def _teach(self, link: WorkerLink) -> None:
        if not self._loaded and not self._uses:
            return
        try:
            held = {it.name for it in await link.adapters()}
            for name, folder in self._loaded.items():
                await self._bring(link, name, folder, held)
            for use in [it for it in self._uses.values() if it.is_known]:
                await self._tell(link, use, held)
        except AdapterError as exc:
            raise Refusal(link.address, f"cannot take part: {exc}") from exc

    async def _bring(self, link: WorkerLink, name: str, folder: str, held: set[str]) -> None:
        """Have it load an adapter, for this pipeline, unless it holds it."""
        if name in held or (link, name) in self._own:
            return
        question = AddAdapter(name=name, path=folder)
        await self._adding.ask(link, name, lambda: link.adapter(question))
        self._own.add((link, name))

    async def _tell(self, link: WorkerLink, use: AdapterUse, held: set[str]) -> None:
        """Have its runs know the number of an adapter, unless they do."""

        async def ask() -> AdapterFacts:
            # Others may have had it added while all ran; who started since does not hold it.
            await self._bring(link, use.name, use.path, held)
            return await self._use(link, use.name, use.number)

        facts = await self._using.ask(link, use.number, ask)
        if self._uses.get(use.name) is not use:  # its last request ended meanwhile
            link.release_adapter(self._lease, use.number)
        elif facts.fingerprint != use.fingerprint:
            raise Refusal(link.address, f"holds another adapter {use.name}")

    def close(self) -> None:
        """The lease ends, and with it every use."""
        for use in self._uses.values():
            use.announced.cancel()
        self._uses.clear()

    async def _announce(self, name: str, number: int) -> AdapterFacts:
        links = self._links
        held = all_of(
            await gather_all(
                links,
                lambda link: self._using.ask(link, number, lambda: self._use(link, name, number)),
            )
        )
        check_same(links, held)
        return held[0]

    async def _use(self, link: WorkerLink, name: str, number: int) -> AdapterFacts:
        return await link.adapter(UseAdapter(lease=self._lease, number=number, name=name))


async def held_everywhere(links: Sequence[WorkerLink]) -> dict[str, list[AdapterFacts]]:
    """By name, what each worker that holds such an adapter says of it, in the workers' order."""
    held: dict[str, list[AdapterFacts]] = {}
    for adapters in await asyncio.gather(*(link.adapters() for link in links)):
        for facts in adapters:
            held.setdefault(facts.name, []).append(facts)
    return held


def folder_of(said: str) -> Path | None:
    """The folder that --adapter names: DIR or NAME=DIR; None where it can only be a name."""
    if is_named(said):
        return Path(said.partition("=")[2]).expanduser().absolute()
    path = Path(said).expanduser()
    if path.is_dir() or not is_adapter_name(said):
        return path.absolute()
    return None


def spawned_adapters(wanted: Collection[str]) -> tuple[tuple[str, str], ...]:
    """(name, folder) of the adapters for workers that are about to be started.

    Raises:
        AdapterError: one is a name only, and nobody holds an adapter yet.
    """
    names: dict[str, str] = {}  # by folder
    for said in wanted:
        folder = folder_of(said)
        if folder is None:
            raise AdapterError(
                f"--adapter {said}: --spawn starts workers that hold no adapter yet, and there is "
                f"no folder {said} here; pass its folder, or NAME=DIR."
            )
        name = said.partition("=")[0] if is_named(said) else name_for(folder)
        if name in names.values() and str(folder) not in names:
            name = f"{name}-{len(names)}"
        names.setdefault(str(folder), name)
    return tuple((name, folder) for folder, name in names.items())


def is_named(said: str) -> bool:
    """Whether it is NAME=DIR."""
    name, equals, _ = said.partition("=")
    return bool(equals) and is_adapter_name(name)


def name_for(folder: Path) -> str:
    """A name that looks like the folder's, or that of the run that it belongs to."""
    own = folder.parent.name if folder.name == TRAINED_FOLDER else folder.name
    return _NO_NAME.sub("-", own).strip("-._+")[:40] or "adapter"


def wire_path(folder: Path) -> str:
    """The folder as the workers are told it.

    Raises:
        AdapterError: it is longer than the wire takes.
    """
    path = str(folder)
    if len(path) > MAX_ADAPTER_PATH_CHARS:
        raise AdapterError(
            f"the path of the adapter {path[:60]}... has {len(path)} characters: at most "
            f"{MAX_ADAPTER_PATH_CHARS} are possible."
        )
    return path


def _fingerprint(folder: Path) -> str | None:
    """Of the adapter in a folder of this machine; None where it lies on the workers' alone."""
    from engine.adapter_files import AdapterFiles

    return AdapterFiles(folder).fingerprint if folder.exists() else None
