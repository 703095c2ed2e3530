"""The demo model's bigger sibling: random, and wide enough that a step takes its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tests.support.models import save_tiny
from tests.support.tokenizers import save_tokenizer

VOCAB: Final = 300
# One layer is 12.6 million parameters, 50 MB in float32: 8 layers are 400 MB to read for every
# token, 40 ms at 10 GB/s.
SIBLING: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def save_sibling(folder: Path, **changes: Any) -> Path:
    """Save it, with a tokenizer, and forget it: 400 MB that no test compares with."""
    save_tiny("llama", folder, **{**SIBLING, **changes})
    save_tokenizer(folder, VOCAB, chat=True)
    return folder
