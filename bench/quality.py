"""What rounding weights, keys and values costs: perplexity on held-out text, by requests' own path.

Every token of a text goes through one stage, in windows, twice: in chunks as a prompt comes
(`prompt`), and in steps of 16 tokens, which meet the kernels that decode steps meet (`decode`):
these round the activations as well. The demo model comes with text that it was not trained on.

    python bench/quality.py                                      # the demo model
    python bench/quality.py --model DIR --text FILE.txt --tokens 32768
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import torch
from torch import Tensor

from engine.attention import StageRun
from engine.checkpoint_source import DEMO_MODEL
from engine.entry import Entry, load_entry
from engine.kernels import native
from engine.stage import Stage
from engine.stage_loading import load_stage

WINDOW_TOKENS: Final = 512
CHUNK_TOKENS: Final = {"prompt": 512, "decode": 16}
# (name, dtype, quantize, quantize_head, kv_quantize)
WAYS: Final = (
    ("float32", "float32", "none", "auto", "none"),
    ("bfloat16", "bfloat16", "none", "auto", "none"),
    ("KV int8", "bfloat16", "none", "auto", "int8"),
    ("int8", "bfloat16", "int8", "auto", "none"),
    ("int4", "bfloat16", "int4", "auto", "none"),
    ("int4, KV int8", "bfloat16", "int4", "auto", "int8"),
    ("int4, head too", "bfloat16", "int4", "same", "none"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a model that is held in one way predicts a text."""

    weights: str
    path: str  # "prompt" or "decode"
    perplexity: float
    stage_bytes: int


def perplexity(entry: Entry, stage: Stage, token_ids: Sequence[int], chunk_tokens: int) -> float:
    """Of a text, predicted window by window; the first token of each window is given.

    Args:
        stage: holds all layers.
        chunk_tokens: how many tokens go through it in one step.
    """
    cache = stage.new_cache(-(-WINDOW_TOKENS // stage.block_tokens))
    total, count = 0.0, 0
    for at in range(0, len(token_ids) - 1, WINDOW_TOKENS):
        window = torch.tensor(token_ids[at : at + WINDOW_TOKENS])
        logits = torch.cat(list(_logits(entry, stage, window, cache, chunk_tokens)))
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum")
        total, count = total + float(loss), count + len(window) - 1
    return math.exp(total / count)


def _logits(
    entry: Entry, stage: Stage, window: Tensor, cache: object, chunk_tokens: int
) -> Iterator[Tensor]:
    blocks = torch.arange(cache.num_blocks)  # type: ignore[attr-defined]
    for start in range(0, len(window), chunk_tokens):
        ids = window[start : start + chunk_tokens]
        run = StageRun(start=start, num_tokens=len(ids), rope_length=len(window), blocks=blocks)
        hidden = entry.embed(ids, range(start, start + len(ids)))
        yield stage.logits(stage.forward(ids, hidden, [run], cache)).cpu()  # type: ignore[arg-type]


def measure(
    model: str | None,
    token_ids: Sequence[int],
    ways: Sequence[tuple[str, str, str, str, str]] = WAYS,
) -> Iterator[Quality]:
    """The perplexity of a text by every way of holding the model, in steps of both sizes."""
    for name, dtype, quantize, head, kv_quantize in ways:
        entry = load_entry(model, dtype=dtype)
        stage = load_stage(
            model,
            sections=1,
            index=0,
            dtype=dtype,
            device="cpu",
            quantize=quantize,
            quantize_head=head,
            kv_quantize=kv_quantize,
        )
        for path, chunk_tokens in CHUNK_TOKENS.items():
            yield Quality(
                weights=name,
                path=path,
                perplexity=perplexity(entry, stage, token_ids, chunk_tokens),
                stage_bytes=stage.stage_bytes,
            )


@click.command()
@click.option("--model", metavar="DIR|HUB_ID", help="Checkpoint. Default: the demo model.")
@click.option("--text", type=click.Path(path_type=Path), default=DEMO_MODEL / "heldout.txt")
@click.option("--tokens", default=16_384, show_default=True, help="Of the text, from its start.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def main(model: str | None, text: Path, tokens: int, as_json: bool) -> None:
    """Measure what rounding weights, keys and values costs."""
    tokenizer = load_entry(model).tokenizer
    assert tokenizer is not None, "the checkpoint has no tokenizer"
    token_ids = tokenizer.encode(text.read_text(encoding="utf-8"), verbose=False)[:tokens]
    if not as_json:
        print(f"{len(token_ids)} tokens of {text.name}, kernels {native.name()}")
        print(f"{'weights':16} {'path':8} {'perplexity':>10} {'more':>8} {'stage':>10}")
    first: float | None = None
    for it in measure(model, token_ids):
        first = it.perplexity if first is None else first
        if as_json:
            print(json.dumps(asdict(it)), flush=True)
            continue
        more = f"{it.perplexity / first - 1:+.2%}"
        size = f"{it.stage_bytes / 1e6:.2f} MB"
        print(f"{it.weights:16} {it.path:8} {it.perplexity:10.3f} {more:>8} {size:>10}", flush=True)


if __name__ == "__main__":
    main()
