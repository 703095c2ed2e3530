"""Variants of the tiny GGUF: one that takes its time to load, one that says any byte."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tests.support.tiny_gguf import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    KV_HEADS,
    NORM_EPS,
    WIDE,
    _gguf_name,
    tiny_vocabulary,
    tiny_weights,
)
from tests.support.tokenizers import SPECIAL

SLOW_WIDE = 1_000_000  # of the feed-forward part: 768 MB, a second or so to load
ALIGNMENT = 32  # of tensors in a GGUF


def slow_to_load_gguf(path: Path) -> Path:
    """A model whose weights are large and all zero. On the disk it is one hole."""
    import gguf

    tokens, merges = tiny_vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(SLOW_WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    num_bytes = 0
    for name, weight in tiny_weights(0, 1).items():
        shape = tuple(SLOW_WIDE if size == WIDE else size for size in weight.shape)
        tensor_bytes = int(np.prod(shape)) * weight.itemsize
        writer.add_tensor_info(_gguf_name(name), shape, weight.dtype, tensor_bytes)
        num_bytes += -(-tensor_bytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + num_bytes + ALIGNMENT)
    return path


def say_any_byte(path: Path) -> None:
    """Let the model of a tiny GGUF say every byte, and end its texts: change it in its place."""
    import gguf

    reader = gguf.GGUFReader(path, "r+")
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    output.data[: len(SPECIAL), 0] = -1000
    output.data[0, 0] = 0  # the end token
    output.data[len(SPECIAL) :, 0] = 0
    output.data.flush()
