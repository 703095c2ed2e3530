"""Whether a model fits into the memory there is, said before it is loaded.

Arithmetic over a model's header and over free bytes that the caller measured. An estimate: what
llama.cpp really takes depends on its version and on its flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from manager.llama_server.gguf_file import ModelFile
from proto.errors import UsageError

DEFAULT_CONTEXT: Final = 8192
DEFAULT_UBATCH: Final = 512
FLOAT_BYTES: Final = 4
# Hidden-sized values that a layer keeps for each token of a micro-batch, at its widest.
WIDTHS_IN_USE: Final = 20
GIGA: Final = 1e9


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes that a model takes while it runs."""

    weight_bytes: int
    kv_bytes: int
    compute_bytes: int  # logits and activations of one micro-batch

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


def context_of(model: ModelFile, asked: int | None) -> int:
    """Tokens of a sequence: what was asked, else so many as are usual, or as the model has."""
    if asked is not None:
        return asked
    return min(DEFAULT_CONTEXT, model.context_length or DEFAULT_CONTEXT)


def memory_need(
    model: ModelFile, *, context: int, parallel: int, ubatch_size: int | None = None
) -> MemoryNeed:
    """What the model takes with `parallel` sequences of `context` tokens."""
    width = model.vocab_size + WIDTHS_IN_USE * model.embedding_length
    return MemoryNeed(
        weight_bytes=model.weight_bytes,
        kv_bytes=model.kv_bytes_per_token * context * parallel,
        compute_bytes=(ubatch_size or DEFAULT_UBATCH) * width * FLOAT_BYTES,
    )


def check_memory(
    model: ModelFile,
    need: MemoryNeed,
    free_bytes: Mapping[str, int],
    shares: Sequence[float] | None = None,
) -> None:
    """Refuse a model that cannot fit.

    Args:
        free_bytes: node -> bytes; of all that hold layers, in their order.
        shares: the part of each (--tensor-split); None: by their memory.
    Raises:
        UsageError: in one sentence, with the numbers.
    """
    free = sum(free_bytes.values())
    where = next(iter(free_bytes)) if len(free_bytes) == 1 else f"the {len(free_bytes)} nodes"
    if need.total_bytes > free:
        raise UsageError(f"{_needs(model, need)}, and {_gb(free)} are free on {where}: {MEND}.")
    if not shares:
        return
    for (node, node_free), share in zip(free_bytes.items(), shares, strict=False):
        part = int(need.total_bytes * share / sum(shares))
        if part > node_free:
            raise UsageError(
                f"{_needs(model, need)}; the part of {node} is {_gb(part)} by tensor_split, and "
                f"{_gb(node_free)} are free there: give it less, or leave tensor_split out."
            )


MEND: Final = (
    "use more nodes, a smaller quantization of the model, or less --context; "
    "--no-check-memory tries all the same"
)


def _needs(model: ModelFile, need: MemoryNeed) -> str:
    return (
        f"{model.path} needs about {_gb(need.total_bytes)} of memory "
        f"({_gb(need.weight_bytes)} of weights, {_gb(need.kv_bytes)} for its context)"
    )


def _gb(count: int) -> str:
    return f"{count / GIGA:.1f} GB" if count >= GIGA / 10 else f"{count / 1e6:.1f} MB"
