"""A tiny Llama with random weights, as a GGUF file and as the Hugging Face checkpoint of the same.

Byte-level BPE over all 256 bytes, a chat template, float32, the same bytes for the same seed. Made
so that its text is printable ASCII and never ends by itself: what a test asks for in tokens is what
it gets, whatever program runs the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.tokenizers import CHAT_TEMPLATE, SPECIAL

Weights = dict[str, np.ndarray]

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = HIDDEN // HEADS
WIDE = 96  # of the feed-forward part
NORM_EPS = 1e-5
ROPE_THETA = 10000.0

# What GPT-2's byte-level BPE writes for a space.
SPACE = "\u0120"
MERGES = ("t h", "th e", f"{SPACE} the", "i n", "e r", "o n", f"{SPACE} a", "a n", "an d")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(path: Path, *, seed: int = 0, num_layers: int = 4, context: int = 512) -> Path:
    """The model as a GGUF of float32.

    Args:
        context: tokens that it says it was trained for.
    """
    import gguf

    tokens, merges = tiny_vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"tiny {seed}")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in tiny_weights(seed, num_layers).items():
        writer.add_tensor(_gguf_name(name), _gguf_layout(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_checkpoint(
    folder: Path, *, seed: int = 0, num_layers: int = 4, context: int = 512
) -> Path:
    """The same model as Hugging Face has it, tokenizer and chat template included."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = tiny_vocabulary()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(tokens),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": context,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    _write_json(folder / "config.json", config)
    save_file(tiny_weights(seed, num_layers), folder / "model.safetensors", {"format": "pt"})
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
        },
    )
    return folder


def tiny_vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges), both as GGUF and tokenizer.json spell them."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)], list(MERGES)


def tiny_weights(seed: int, num_layers: int) -> Weights:
    """Float32 weights under the names of a Hugging Face Llama."""
    random = np.random.default_rng(seed)
    tokens, _ = tiny_vocabulary()

    def drawn(*shape: int, spread: float = 0.3) -> np.ndarray:
        return (spread * random.standard_normal(shape)).astype(np.float32)

    weights = {"model.embed_tokens.weight": drawn(len(tokens), HIDDEN)}
    for layer in range(num_layers):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_SIZE, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_SIZE),
            "mlp.gate_proj": (WIDE, HIDDEN),
            "mlp.up_proj": (WIDE, HIDDEN),
            "mlp.down_proj": (HIDDEN, WIDE),
        }
        for part, shape in shapes.items():
            weight = drawn(*shape)
            if part in ("self_attn.o_proj", "mlp.down_proj"):
                weight[0] = 0  # nothing writes to the first hidden value: it stays what it was
            weights[f"model.layers.{layer}.{part}.weight"] = weight
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{part}.weight"] = 1 + drawn(HIDDEN, spread=0.1)
    weights["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    weights["lm_head.weight"] = drawn(len(tokens), HIDDEN)
    # The first hidden value is large and positive for every token, so that the first column of the
    # last matrix is a bias: it rules out what is not printable ASCII, and the end of the text.
    weights["model.embed_tokens.weight"][:, 0] = 8
    for index, token in enumerate(tokens):
        is_shown = all(character == SPACE or " " < character < "\x7f" for character in token)
        weights["lm_head.weight"][index, 0] = 0 if is_shown and index >= len(SPECIAL) else -1000
    return weights


def _gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _gguf_layout(name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp rotates neighbouring values, transformers the halves: rows of q and k move."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
