"""The pipeline for programs: open it over some workers, stream, generate, close.

    async with await Pipeline.open(["10.0.0.2:7710", "10.0.0.3:7710"]) as pipeline:
        async for piece in pipeline.stream("Once upon a time"):
            print(piece.text, end="", flush=True)
        completions = await asyncio.gather(*(pipeline.generate(prompt) for prompt in prompts))

Owns the links, the leases and the model's entry; who runs when is the scheduler's, behind
`manager.dispatcher`, and what follows a loss is `manager.keeper`'s. Every command line of the
manager stands on this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from engine.event_log import SchedulerSetUp
from engine.requests import Stats
from manager.adapter_book import AdapterBook, AdapterUse, held_everywhere
from manager.dispatcher import Dispatcher, Trace
from manager.encoding import Encoder, Message, Prompt, id_outside
from manager.event_log import EventLog
from manager.event_loop import in_background
from manager.generation import GREEDY, Completion, GenerationOptions, Piece
from manager.keeper import ChainKeeper, OnChain
from manager.links import WorkerLink
from manager.opening import Loaded, OnProgress, load, look, wanted_blocks
from manager.pace import AT_ONCE, Pace
from manager.recovery import RecoverySettings
from manager.sequences import ActiveSequence, Constraint
from manager.steps import StepWriter
from manager.text import NOTHING_SHOWN
from manager.topology import OpenChain, open_chain
from proto.errors import Error, ModelError, RequestRefused, UsageError, WorkerLost
from proto.keys import Keys, read_keys
from proto.messages import Status, Step, WorkerFacts
from proto.tls import TlsFiles

# One prefill chunk: large enough to keep torch's threads busy, small enough that the decode
# tokens beside it do not wait long.
TOKEN_BUDGET: Final = 512

# Tokenizers take about a millisecond for so much; longer texts are left to a thread.
INLINE_CHARS: Final = 4096

RECOVERY: Final = RecoverySettings()

OnPrefill = Callable[[int, int], None]  # prompt tokens computed, prompt tokens
TokensHint = int | Callable[[Encoder], int]  # tokens of a sequence, known or to be counted


class Pipeline:
    """A chain of workers that is ready to generate. Made by `Pipeline.open`."""

    def __init__(
        self,
        chain: OpenChain,
        loaded: Loaded,
        *,
        lease: bytes,
        num_blocks: int,
        keys: Keys,
        recovery: RecoverySettings,
        trace: Trace | None,
        event_log: EventLog | None,
        on_notice: OnProgress,
        on_chain: OnChain,
    ) -> None:
        self._trace, self._event_log, self._on_notice = trace, event_log, on_notice
        self._adapters = AdapterBook(chain.links, lease)
        self._encoder, entry = loaded.encoder, loaded.entry
        self._eos = frozenset(entry.eos_token_ids)
        self._encoding = asyncio.Lock()  # one long prompt at a time leaves the loop
        self.max_context: Final = chain.facts[0].max_context
        self._writer = StepWriter(lease, entry, self._send_step, self._writer_failed)
        set_up = SchedulerSetUp(
            num_stages=len(chain.links),
            num_blocks=num_blocks,
            block_tokens=chain.facts[0].block_tokens,
            max_context=self.max_context,
            token_budget=min(TOKEN_BUDGET, *(facts.max_step_tokens for facts in chain.facts)),
            rope_switch=entry.rope_switch,
        )
        if event_log is not None:
            event_log.begin(set_up)
        self._dispatcher = Dispatcher(
            set_up.scheduler(),
            self._writer,
            loaded.vocabulary,
            eos=entry.eos_token_ids,
            prompt_salt=entry.prompt_salt,
            trace=trace,
            on_event=None if event_log is None else event_log.add,
        )
        self._closed = False
        self._keeper = ChainKeeper(
            chain,
            loaded,
            self._dispatcher,
            self._adapters,
            lease=lease,
            num_blocks=num_blocks,
            keys=keys,
            settings=recovery,
            trace=trace,
            on_notice=on_notice,
            on_chain=on_chain,
        )

    @classmethod
    async def open(
        cls,
        workers: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        secret_file: str | Path | None = None,
        tls: TlsFiles | None = None,
        max_sequences: int = 16,
        max_tokens_hint: TokensHint | None = None,
        recovery: RecoverySettings = RECOVERY,
        trace: Trace | None = None,
        event_log: EventLog | None = None,
        on_progress: OnProgress = lambda _: None,
        on_notice: OnProgress = lambda _: None,
        on_chain: OnChain = lambda _: None,
    ) -> Pipeline:
        """Connect to the workers and reserve room on them.

        Args:
            workers: HOST:PORT of every worker, in any order; None: the neighbours of
                127.0.0.1:7710. Of several that hold the same section, all but one are spares.
            model: folder or hub id, for tokenizer and embeddings; None: what the workers hold.
            secret_file, tls: what the workers were started with.
            max_sequences: how many requests should run at the same time.
            max_tokens_hint: how long they will be, prompt included; a function is given the
                model's encoder to count with. More requests, or longer ones, wait or end early.
            recovery: how long requests wait for a chain when a worker is lost.
            trace: told when each step was where.
            event_log: takes the scheduler's events, for `manager replay`; closed with the pipeline.
            on_progress: told in a few words what is being done until it is open.
            on_notice: told of losses and recoveries, in words for people.
            on_chain: told of each loss as it is noticed, and None when requests go on.
        Raises:
            WorkerUnreachable, WorkerRefused, SplitError, ModelError, UsageError: in one sentence.
        """
        if max_sequences < 1:
            raise UsageError(f"max_sequences is {max_sequences}: at least 1 request must run.")
        keys = read_keys(secret_file, tls)
        on_progress("looking at the workers")
        facts = await look(workers, keys, on_progress)
        # No link is open meanwhile: importing torch can hold this process up for longer than a
        # worker waits for a sign of life.
        on_progress(f"loading the tokenizer of {facts.model}")
        loaded = await in_background(load, model, facts)
        if callable(max_tokens_hint):
            max_tokens_hint = await in_background(max_tokens_hint, loaded.encoder)
        on_progress("connecting to the workers")
        chain = await open_chain(workers, keys=keys)
        try:
            loaded.check(chain.facts[0])
            lease = secrets.token_bytes(16)
            min_blocks, want_blocks = wanted_blocks(chain.facts, max_sequences, max_tokens_hint)
            num_blocks = await chain.lease(
                lease, min_blocks=min_blocks, want_blocks=want_blocks, trace=trace is not None
            )
            await chain.route(lease, epoch=0)
            if trace is not None:
                await chain.compare_clocks()
        except BaseException:
            await chain.close("the manager gave up")
            raise
        return cls(
            chain,
            loaded,
            lease=lease,
            num_blocks=num_blocks,
            keys=keys,
            recovery=recovery,
            trace=trace,
            event_log=event_log,
            on_notice=on_notice,
            on_chain=on_chain,
        )

    # --- what there is -----------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, a transformers one; None where the checkpoint has none."""
        return self._encoder.tokenizer

    @property
    def _links(self) -> tuple[WorkerLink, ...]:
        """Of the chain as it is now."""
        return self._keeper.chain.links

    @property
    def workers(self) -> tuple[WorkerFacts, ...]:
        """What each worker of the chain says of itself, first section first."""
        return self._keeper.chain.facts

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the workers were reached, in the same order."""
        return tuple(str(link.address) for link in self._links)

    @property
    def model_name(self) -> str:
        """The model's name for people."""
        return self._encoder.model_name

    @property
    def identity(self) -> dict[str, Any]:
        """What every text depends on beside its request."""
        facts = self.workers[0]
        return {
            "model": self.model_name,
            "fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "adapters": dict(sorted(self._adapters.fingerprints.items())) or None,
        }

    @property
    def holder(self) -> str:
        """Who holds which layers, for people."""
        held = zip(self.workers, self.addresses, strict=True)
        return "layers " + ", ".join(
            f"{facts.start_layer}:{facts.end_layer} at {address}" for facts, address in held
        )

    @property
    def lost(self) -> Error | None:
        """Why no request can run, once nobody waits for a chain any more: mostly a `WorkerLost`.

        None again when there is a chain after all.
        """
        return self._dispatcher.lost

    @property
    def mending(self) -> Error | None:
        """The loss for which requests wait until there is another chain; None mostly."""
        return self._keeper.loss

    def stats(self) -> Stats:
        """How many requests run and wait, and how much KV is free; for progress displays."""
        return self._dispatcher.stats()

    async def status(self) -> list[tuple[WorkerFacts, Status, float | None]]:
        """What each worker counts now, and the round trip to it in seconds."""
        links = self._links
        answers = await asyncio.gather(*(link.status() for link in links))
        return [
            (link.facts, answer, link.rtt_s) for link, answer in zip(links, answers, strict=True)
        ]

    async def usage(self) -> dict[str, Any]:
        """What metrics say beside the workers' numbers: nothing."""
        return {}

    # --- requests ----------------------------------------------------------------------------

    async def provide_adapters(self, wanted: Collection[str]) -> None:
        """Let requests name each of these as their adapter: a name, a folder, or NAME=DIR.

        Names that the workers hold need no word before they are used. A folder that they do not
        hold is loaded on their machines, for this pipeline only.

        Raises:
            AdapterError: there is no such adapter, or a worker cannot load it.
        """
        await self._adapters.provide(wanted)

    async def held_adapters(self) -> list[str]:
        """Names of the adapters that requests may use: those that every worker holds.

        Raises:
            WorkerLost: a worker does not answer.
        """
        held = await held_everywhere(self._links)
        return sorted(it for it, facts in held.items() if len(facts) == len(self._links))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Any of these ends a text."""
        return self._eos

    def encode(self, text: str) -> Prompt:
        """A plain prompt's tokens."""
        return self._encoder.encode(text)

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> Prompt:
        """A conversation's tokens, in the model's chat template."""
        return self._encoder.encode_chat(messages, **template)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be prompts."""
        return self._encoder.has_chat_template

    async def stream(
        self,
        prompt: str | Sequence[int] | Prompt,
        options: GenerationOptions = GREEDY,
        *,
        on_prefill: OnPrefill | None = None,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] = NOTHING_SHOWN,
        pace: Pace = AT_ONCE,
    ) -> AsyncIterator[Piece]:
        """Generate, piece by piece; leaving the loop early frees what the request holds.

        A request that fails on the way ends with a piece whose finish reason is "error".

        Args:
            constraint: which tokens may be drawn, where not all may; made for this request.
            shown: special tokens that have a text in this one, and that text.
            pace: how often pieces come, where tokens come faster.
        Raises:
            RequestRefused: it can never run: empty, or longer than the context or the KV.
            WorkerLost: a worker went away before the request.
        """
        asked = self._request(prompt, options, on_prefill, constraint, shown, pace)
        async with asked as sequence:
            async for piece in sequence.pieces():
                yield piece

    async def generate(
        self,
        prompt: str | Sequence[int] | Prompt,
        options: GenerationOptions = GREEDY,
        *,
        on_piece: Callable[[Piece], None] | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> Completion:
        """Generate to the end. Many may run at once.

        Args:
            on_piece: called with every piece as it comes; an error that it raises ends the request.
        Raises:
            RequestRefused, WorkerLost: as `stream`.
        """
        async with self._request(prompt, options, on_prefill) as sequence:
            async for piece in sequence.pieces():
                if on_piece is not None:
                    on_piece(piece)
        return sequence.completion()

    @asynccontextmanager
    async def _request(
        self,
        prompt: str | Sequence[int] | Prompt,
        options: GenerationOptions,
        on_prefill: OnPrefill | None,
        constraint: Constraint | None = None,
        shown: Mapping[int, str] = NOTHING_SHOWN,
        pace: Pace = AT_ONCE,
    ) -> AsyncIterator[ActiveSequence]:
        """A request for the block; then nothing is left of it here or on the workers."""
        prompt = await self._checked(prompt)
        adapter = None
        if options.adapter is not None:
            adapter = await self._adapter(options.adapter)
        try:
            sequence = self._dispatcher.submit(
                prompt, options, on_prefill, adapter, constraint, shown, pace
            )
            try:
                yield sequence
            finally:
                self._dispatcher.cancel(sequence)
        finally:
            if adapter is not None:
                self._adapters.release(adapter)

    async def _adapter(self, name: str) -> AdapterUse:
        """The adapter of a request; while there is no chain it waits as the request would."""
        while True:
            await self._keeper.settled.wait()
            links = self._links
            try:
                return await self._adapters.acquire(name)
            except WorkerLost:
                if self.lost is not None or self._closed:
                    raise
                if self._links is links and self._keeper.settled.is_set():
                    await asyncio.sleep(0)  # the link says so itself in a moment

    async def _checked(self, prompt: str | Sequence[int] | Prompt) -> Prompt:
        """A prompt's tokens, which the model knows.

        Raises:
            RequestRefused: one is none of the model's.
            UsageError: the pipeline is closed.
        """
        if isinstance(prompt, str):
            prompt = await self._encode(prompt)
        elif not isinstance(prompt, Prompt):
            prompt = Prompt(tuple(prompt))
        if self._closed:
            raise UsageError("the pipeline is closed: open another one.")
        vocab_size = self.workers[0].vocab_size
        stranger = id_outside(prompt.token_ids, vocab_size)
        if stranger is not None:
            raise RequestRefused(
                f"the prompt has token id {stranger}, the model's ids are 0 to {vocab_size - 1}."
            )
        return prompt

    async def _encode(self, text: str) -> Prompt:
        if len(text) < INLINE_CHARS:
            return self.encode(text)
        async with self._encoding:
            return await asyncio.to_thread(self.encode, text)

    # --- the end -----------------------------------------------------------------------------

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End what still runs, give the leases back, and leave. Twice does no harm."""
        if self._closed:
            return
        self._closed = True
        await self._keeper.stop()
        self._dispatcher.end_all("the pipeline was closed")
        self._adapters.close()
        await self._writer.close()
        if self._trace is not None and self._dispatcher.lost is None:
            # An answer comes behind everything that a worker said before: the last reports.
            await asyncio.gather(*(it.status() for it in self._links), return_exceptions=True)
        await self._keeper.close()
        if self._trace is not None:
            self._trace.close()
        if self._event_log is not None:
            self._event_log.close()
            if self._event_log.error is not None:
                self._on_notice(str(self._event_log.error))

    def _send_step(self, step: Step, tables: bytes, hidden: memoryview, epoch: int) -> None:
        self._keeper.send(step, tables, hidden, epoch)

    def _writer_failed(self, exc: BaseException) -> None:
        self._dispatcher.lose(ModelError(f"the prompt could not be embedded: {exc}"))
