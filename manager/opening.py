"""What is known of a pipeline before it opens: what the workers hold, and what is read of it here.

Looks at the workers as an observer, waits for those that are loading, and reads tokenizer and
embeddings of the same checkpoint. Knows no lease and no request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from manager.encoding import Encoder
from manager.text import Vocabulary
from manager.topology import OpenChain, open_chain
from proto.errors import ModelError, WorkerLoading
from proto.keys import Keys
from proto.messages import Role, WorkerFacts

if TYPE_CHECKING:
    from engine.entry import Entry

# A worker that is loading is called again this often, and given up when it said the same for so
# long: a board may need minutes to import torch from an SD card.
LOADING_POLL_S: Final = 0.3
LOADING_STALLS_S: Final = 300.0

OnProgress = Callable[[str], None]  # a few words on what is being done


def wanted_blocks(
    workers: Sequence[WorkerFacts], max_sequences: int, tokens_each: int | None
) -> tuple[int, int]:
    """KV blocks to ask every worker for: at least, and at best.

    One sequence must fit, unless it is longer than the workers could ever hold: then the request
    itself is refused, with the numbers. Who does not know how long sequences get asks for room
    for the longest, and leaves half of what is free to other managers.
    """
    block_tokens, max_context = workers[0].block_tokens, workers[0].max_context
    most = min(facts.total_blocks for facts in workers)
    free = min(facts.free_blocks for facts in workers)
    each = -(-min(tokens_each or max_context, max_context) // block_tokens)
    if tokens_each is None:
        least = 1
        best = min(each * max_sequences, max(free // 2, each))
    else:
        least = min(each, most)
        best = each * max_sequences
    return least, max(least, min(best, most))


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the manager reads of a checkpoint."""

    entry: Entry
    encoder: Encoder
    vocabulary: Vocabulary
    path: str | None  # where it was read here; None: the demo model

    def check(self, facts: WorkerFacts) -> None:
        """Raises ModelError unless the workers hold the same model."""
        entry = self.entry
        if entry.fingerprint != facts.fingerprint:
            raise ModelError(
                f"--model {entry.model_name} ({entry.fingerprint[:8]}) is not the model that the "
                f"workers hold, {facts.model} ({facts.fingerprint[:8]}): pass the same checkpoint."
            )


async def look(
    workers: str | Sequence[str] | None, keys: Keys, on_progress: OnProgress
) -> WorkerFacts:
    """What the workers hold; they are known to make up a chain, as far as that goes.

    Waits for workers that are loading, as long as they get on with it.
    """
    chain = await _open_loaded_chain(workers, keys, on_progress)
    await chain.close("only looked")
    return chain.facts[0]


async def _open_loaded_chain(
    workers: str | Sequence[str] | None, keys: Keys, on_progress: OnProgress
) -> OpenChain:
    said, give_up_s = "", 0.0
    while True:
        try:
            return await open_chain(workers, role=Role.OBSERVER, keys=keys)
        except WorkerLoading as loading:
            if str(loading) != said:
                said, give_up_s = str(loading), time.monotonic() + LOADING_STALLS_S
                on_progress(said)
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(LOADING_POLL_S)


def load(model: str | None, facts: WorkerFacts) -> Loaded:
    """Tokenizer and embeddings, of the same checkpoint as the workers'."""
    from engine.entry import load_entry

    path = model if model is not None else facts.model_path or None
    try:
        entry = load_entry(path, dtype=facts.dtype)
    except ModelError as exc:
        if model is not None:
            raise
        raise ModelError(
            f"the workers hold {facts.model} ({facts.model_path or 'the demo model'}), and its "
            f"tokenizer is to be read here, but: {exc}; pass --model with the same model's "
            "folder on this machine"
        ) from exc
    encoder = Encoder(entry.tokenizer, entry.model_name)
    loaded = Loaded(entry, encoder, Vocabulary(entry.tokenizer), path)
    loaded.check(facts)
    return loaded
