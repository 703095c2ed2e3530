"""The very same weights as a GGUF file, in llama.cpp's BF16, Q8_0 or Q4_0; kept as checkpoints are.

Needs the `gguf` package. Every matrix has the same type, the head and the embedding included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.measuring.checkpoints import (
    END,
    check_room,
    checkpoint,
    from_bf16,
    read_weights,
    vocabulary,
)
from bench.measuring.shapes import Config, Shape

BITS: Final = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
BYTES_PER_WEIGHT: Final = {"BF16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}
PIECE: Final = 8 * 2**20  # weights quantized at once

Weights = Mapping[str, np.ndarray]
Named = Iterator[tuple[str, np.ndarray]]


def gguf_file(shape: Shape, bits: str) -> Path:
    """The GGUF of this shape, written if it was not there.

    Args:
        bits: "bf16", "int8" or "int4".
    Raises:
        ImportError: there is no `gguf` package.
    """
    import gguf

    kind = BITS[bits]
    folder = checkpoint(shape)
    path = folder.with_name(f"{folder.name}.{kind}.gguf")
    if path.is_file():
        return path
    num_bytes = int(shape.num_parameters * BYTES_PER_WEIGHT[kind])
    check_room(path.parent, num_bytes, f"{shape.what} in {kind}")
    print(f"writing {path} ({num_bytes / 1e9:.1f} GB)", file=sys.stderr, flush=True)
    building = path.with_suffix(f".building-{os.getpid()}")
    try:
        write(building, shape, read_weights(folder), gguf.GGMLQuantizationType[kind])
        building.rename(path)
    finally:
        building.unlink(missing_ok=True)
    return path


def write(path: Path, shape: Shape, weights: Weights, kind: Any) -> None:
    """Header first, then tensor by tensor, so that memory holds one at a time."""
    import gguf

    model_type = str(shape.config["model_type"])
    arch = {"mixtral": "llama"}.get(model_type, model_type)
    writer = gguf.GGUFWriter(path, arch)
    _add_sizes(writer, shape)
    _add_tokenizer(writer, shape.vocab_size)
    layout = LAYOUTS[shape.config["model_type"]]
    for name, tensor in layout(shape.config, weights):
        own = _kind_of(name, tensor, kind)
        _add_info(writer, name, tensor.shape, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in layout(shape.config, weights):
        writer.write_tensor_data(encoded(tensor, _kind_of(name, tensor, kind)))
    writer.close()


def _add_info(writer: Any, name: str, shape: tuple[int, ...], kind: Any) -> None:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = int(np.prod(shape)) // block * block_bytes
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes)
        return
    rows = (*shape[:-1], shape[-1] // block * block_bytes)
    writer.add_tensor_info(name, rows, np.dtype(np.uint8), num_bytes, raw_dtype=kind)


def _kind_of(name: str, tensor: np.ndarray, kind: Any) -> Any:
    """Vectors, and what chooses an expert, stay exact, as in llama.cpp's own conversion."""
    import gguf

    exact = tensor.ndim == 1 or "gate_inp" in name or name == "position_embd.weight"
    return gguf.GGMLQuantizationType.F32 if exact else kind


def encoded(bits: np.ndarray, kind: Any) -> np.ndarray:
    """bfloat16 bits in a GGUF type; a matrix as rows of bytes."""
    import gguf

    if kind == gguf.GGMLQuantizationType.F32:
        return from_bf16(bits)
    if kind == gguf.GGMLQuantizationType.BF16:
        return np.ascontiguousarray(bits).view(np.uint8)
    rows = bits.reshape(-1, bits.shape[-1])
    step = max(1, PIECE // rows.shape[1])
    pieces = [
        gguf.quants.quantize(from_bf16(np.ascontiguousarray(rows[start : start + step])), kind)
        for start in range(0, len(rows), step)
    ]
    return np.concatenate(pieces).reshape(*bits.shape[:-1], -1)


def _add_sizes(writer: Any, shape: Shape) -> None:
    config = shape.config
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    writer.add_name("random")  # llama.cpp looks for tokens of Phi-3's in what is called so
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_vocab_size(shape.vocab_size)
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(hidden // heads)
        writer.add_rope_freq_base(config["rope_theta"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _add_tokenizer(writer: Any, vocab_size: int) -> None:
    import gguf

    tokens, merges = vocabulary(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if it == END else gguf.TokenType.NORMAL for it in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


# --- names and layouts ------------------------------------------------------------------------

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def _llama(config: Config, weights: Weights) -> Named:
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    for theirs, ours in _OUTER.items():
        yield f"{theirs}.weight", weights[f"{ours}.weight"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from _norms(layer, weights)
        for theirs, ours, turned in (
            ("attn_q", "q_proj", heads),
            ("attn_k", "k_proj", keys),
            ("attn_v", "v_proj", None),
            ("attn_output", "o_proj", None),
        ):
            tensor = weights[f"{at}.self_attn.{ours}.weight"]
            yield f"blk.{layer}.{theirs}.weight", turn(tensor, turned) if turned else tensor
        yield from _feed_forward(config, layer, weights)


def _feed_forward(config: Config, layer: int, weights: Weights) -> Named:
    at = f"model.layers.{layer}"
    if "num_local_experts" not in config:
        for part in ("gate", "up", "down"):
            yield f"blk.{layer}.ffn_{part}.weight", weights[f"{at}.mlp.{part}_proj.weight"]
        return
    at += ".block_sparse_moe"
    yield f"blk.{layer}.ffn_gate_inp.weight", weights[f"{at}.gate.weight"]
    for part, number in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        experts = range(config["num_local_experts"])
        stacked = np.stack([weights[f"{at}.experts.{it}.{number}.weight"] for it in experts])
        yield f"blk.{layer}.ffn_{part}_exps.weight", stacked


def _phi3(config: Config, weights: Weights) -> Named:
    for theirs, ours in _OUTER.items():
        yield f"{theirs}.weight", weights[f"{ours}.weight"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from _norms(layer, weights)
        yield f"blk.{layer}.attn_qkv.weight", weights[f"{at}.self_attn.qkv_proj.weight"]
        yield f"blk.{layer}.attn_output.weight", weights[f"{at}.self_attn.o_proj.weight"]
        yield f"blk.{layer}.ffn_up.weight", weights[f"{at}.mlp.gate_up_proj.weight"]
        yield f"blk.{layer}.ffn_down.weight", weights[f"{at}.mlp.down_proj.weight"]


def _gpt2(config: Config, weights: Weights) -> Named:
    yield "token_embd.weight", weights["wte.weight"]
    yield "position_embd.weight", weights["wpe.weight"]
    names = {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }
    for layer in range(config["n_layer"]):
        for theirs, ours in names.items():
            tensor = weights[f"h.{layer}.{ours}.weight"]
            yield f"blk.{layer}.{theirs}.weight", tensor.T if tensor.ndim == 2 else tensor
            yield f"blk.{layer}.{theirs}.bias", weights[f"h.{layer}.{ours}.bias"]
    yield "output_norm.weight", weights["ln_f.weight"]
    yield "output_norm.bias", weights["ln_f.bias"]


def _norms(layer: int, weights: Weights) -> Named:
    at = f"model.layers.{layer}"
    yield f"blk.{layer}.attn_norm.weight", weights[f"{at}.input_layernorm.weight"]
    yield f"blk.{layer}.ffn_norm.weight", weights[f"{at}.post_attention_layernorm.weight"]


def turn(tensor: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring values, transformers the halves: rows of q and k move."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


LAYOUTS: Final[Mapping[str, Callable[[Config, Weights], Named]]] = {
    "llama": _llama,
    "mixtral": _llama,
    "phi3": _phi3,
    "gpt2": _gpt2,
}
