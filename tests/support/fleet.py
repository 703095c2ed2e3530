"""Three workers of a tiny model and a spare of each, for tests to kill and to start again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import MappingProxyType

from manager.generation import Completion, GenerationOptions, Piece
from manager.pipeline import Pipeline
from tests.support.chains import sections_of
from tests.support.forked_workers import ForkedWorker, Gate, Nursery

SECTIONS = 3


class Fleet:
    """Workers by name: "0" to "2" hold the sections, "0s" to "2s" hold them as well."""

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        kv_memory: str = "16MB",
        *more: str,
        gates: Mapping[str, Gate] = MappingProxyType({}),
    ) -> None:
        self._nursery = nursery
        self._gates = {name: gate.path for name, gate in gates.items()}
        self._words = sections_of(folder, SECTIONS, "--kv-memory", kv_memory, *more)
        self._workers: dict[str, ForkedWorker] = {}
        self._gone: set[str] = set()

    def __getitem__(self, name: str) -> ForkedWorker:
        return self._workers[name]

    def made_whole(self, *, spares: Sequence[int] = ()) -> list[str]:
        """Have a worker for each section and these spares; their addresses, spares last."""
        names = [*map(str, range(SECTIONS)), *(f"{index}s" for index in spares)]
        for name in names:
            known = self._workers.get(name)
            if known is None:
                words = self._words[int(name[0])]
                gate = self._gates.get(name)
                self._workers[name] = self._nursery.start(*words, wait=False, gate=gate)
            elif name in self._gone:
                self._workers[name] = known.start_again(wait=False)
        for name in names:
            self._workers[name].wait_until_ready()
        self._gone -= set(names)
        return [self._workers[name].address for name in names]

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._workers[name].kill()
        self._gone.add(name)

    def left(self, name: str) -> int:
        """Wait until it has ended by itself; its exit code."""
        self._gone.add(name)
        return self._workers[name].wait()

    def revive(self, name: str) -> None:
        """Start it again at its address, without waiting for it."""
        self._workers[name] = self._workers[name].start_again(wait=False)
        self._gone.discard(name)

    def holder(self, address: str) -> str:
        """The name of the worker at this address."""
        return next(name for name, it in self._workers.items() if it.address == address)


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: list[int]
    options: GenerationOptions


@dataclass
class Heard:
    """What came of it: in pieces, and whole."""

    completion: Completion
    pieces: list[Piece] = field(default_factory=list)

    @property
    def story(self) -> tuple[object, ...]:
        """All that must not depend on who computed it."""
        it = self.completion
        return it.token_ids, it.text, it.finish_reason, it.error

    def check_pieces(self) -> None:
        """No token came twice, none is missing."""
        tokens = [token for piece in self.pieces for token in piece.token_ids]
        assert tokens == list(self.completion.token_ids)
        assert "".join(piece.text for piece in self.pieces) == self.completion.text
        scores = [it.prompt_logprobs for it in self.pieces if it.prompt_logprobs is not None]
        assert scores == [self.completion.prompt_logprobs] * len(scores) and len(scores) < 2

    @property
    def prompt_logprobs(self) -> list[float]:
        """Of the prompt's tokens, where they were asked for."""
        return [it.logprob for it in self.completion.prompt_logprobs or ()]


async def ask_all(
    pipeline: Pipeline,
    requests: Sequence[Asked],
    *,
    on_token: Callable[[int, int], None] = lambda of_request, of_all: None,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> list[Heard]:
    """All at once; `on_token` hears how many tokens a request has now, and all together."""
    numbers = count(1)

    async def ask(request: Asked) -> Heard:
        pieces: list[Piece] = []
        own = count(1)

        def take(piece: Piece) -> None:
            pieces.append(piece)
            for _ in piece.token_ids:
                on_token(next(own), next(numbers))

        completion = await pipeline.generate(
            request.prompt, request.options, on_piece=take, on_prefill=on_prefill
        )
        return Heard(completion, pieces)

    return list(await asyncio.gather(*map(ask, requests)))
