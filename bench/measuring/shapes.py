"""The models that are measured: sizes of real ones, weights drawn at random.

A shape is a `config.json` and the names and sizes of its tensors, as the hub has them. Speed does
not depend on what the weights say, so nothing is downloaded. Writes no file; `checkpoints` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

Tensors = Iterator[tuple[str, tuple[int, ...]]]
Config = Mapping[str, Any]

FORMAT: Final = 2  # of the files; a higher one has them written anew


@dataclass(frozen=True)
class Shape:
    """One model, by what decides its speed."""

    name: str
    what: str
    config: Config

    @property
    def key(self) -> str:
        """Name of its files: another one as soon as anything of it changes."""
        text = json.dumps([FORMAT, dict(self.config)], sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def num_layers(self) -> int:
        return int(self.config[self._layers_key])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def max_context(self) -> int:
        return int(self.config.get("max_position_embeddings") or self.config["n_positions"])

    def tensors(self) -> Tensors:
        """(name, shape) of every tensor, in the order in which they are written."""
        return TENSORS[self.config["model_type"]](self.config)

    @property
    def num_parameters(self) -> int:
        total = 0
        for _, sizes in self.tensors():
            count = 1
            for size in sizes:
                count *= size
            total += count
        return total

    def changed(self, **changes: Any) -> Shape:
        """The same with other settings in its config; `num_layers` is one for all kinds."""
        if "num_layers" in changes:
            changes[self._layers_key] = changes.pop("num_layers")
        return replace(self, config={**self.config, **changes})

    @property
    def _layers_key(self) -> str:
        return "n_layer" if "n_layer" in self.config else "num_hidden_layers"


def _llama(config: Config) -> Tensors:
    yield from _embeddings(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from _attention(at, config)
        yield from _norms(at, config)
        wide, hidden = config["intermediate_size"], config["hidden_size"]
        yield f"{at}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{at}.mlp.up_proj.weight", (wide, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, wide)


def _mixtral(config: Config) -> Tensors:
    yield from _embeddings(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield from _attention(at, config)
        yield from _norms(at, config)
        wide, hidden = config["intermediate_size"], config["hidden_size"]
        experts = config["num_local_experts"]
        yield f"{at}.block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts):
            of_expert = f"{at}.block_sparse_moe.experts.{expert}"
            yield f"{of_expert}.w1.weight", (wide, hidden)
            yield f"{of_expert}.w2.weight", (hidden, wide)
            yield f"{of_expert}.w3.weight", (wide, hidden)


def _phi3(config: Config) -> Tensors:
    yield from _embeddings(config)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    fused = hidden + 2 * head * config["num_key_value_heads"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.qkv_proj.weight", (fused, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield from _norms(at, config)
        yield f"{at}.mlp.gate_up_proj.weight", (2 * wide, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, wide)


def _gpt2(config: Config) -> Tensors:
    hidden = config["n_embd"]
    yield "wte.weight", (config["vocab_size"], hidden)
    yield "wpe.weight", (config["n_positions"], hidden)
    for layer in range(config["n_layer"]):
        at = f"h.{layer}"
        for norm in ("ln_1", "ln_2"):
            yield f"{at}.{norm}.weight", (hidden,)
            yield f"{at}.{norm}.bias", (hidden,)
        for part, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),  # inputs first: GPT-2's own layout
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            yield f"{at}.{part}.weight", (rows, columns)
            yield f"{at}.{part}.bias", (columns,)
    yield "ln_f.weight", (hidden,)
    yield "ln_f.bias", (hidden,)


def _embeddings(config: Config) -> Tensors:
    yield "model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])
    yield "model.norm.weight", (config["hidden_size"],)
    yield "lm_head.weight", (config["vocab_size"], config["hidden_size"])


def _attention(at: str, config: Config) -> Tensors:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = head * config["num_key_value_heads"]
    yield f"{at}.self_attn.q_proj.weight", (heads * head, hidden)
    yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
    yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
    yield f"{at}.self_attn.o_proj.weight", (hidden, heads * head)


def _norms(at: str, config: Config) -> Tensors:
    yield f"{at}.input_layernorm.weight", (config["hidden_size"],)
    yield f"{at}.post_attention_layernorm.weight", (config["hidden_size"],)


TENSORS: Final[Mapping[str, Callable[[Config], Tensors]]] = {
    "llama": _llama,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "gpt2": _gpt2,
}

_COMMON: Final[Config] = {
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_LLAMA: Final[Config] = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
_PHI3: Final[Config] = {
    **_COMMON,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": None,
}
# Invented: those of Phi-3.5 are learnt, and stand in its config.json on the hub alone. Only their
# number counts for speed and memory.
_SHORT_FACTORS: Final = [1.0 + 0.025 * i for i in range(48)]
_LONG_FACTORS: Final = [1.08 * 1.09**i for i in range(48)]

SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape(
            "llama",
            "Llama of 1.1e9 parameters (TinyLlama's sizes)",
            {
                **_LLAMA,
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
            },
        ),
        Shape(
            "phi3",
            "Phi-3-mini (fused projections), 10 of its 32 layers",
            {**_PHI3, "num_hidden_layers": 10},
        ),
        Shape(
            "gpt2",
            "GPT-2 large",
            {
                **_COMMON,
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                "vocab_size": 50257,
                "n_embd": 1280,
                "n_layer": 36,
                "n_head": 20,
                "n_positions": 1024,
                "n_ctx": 1024,
                "layer_norm_epsilon": 1e-5,
                "activation_function": "gelu_new",
                "tie_word_embeddings": True,
            },
        ),
        Shape(
            "moe",
            "Mixtral's layers, small: 8 experts, 2 of them a token, 0.8e9 parameters",
            {
                **_LLAMA,
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "hidden_size": 1024,
                "intermediate_size": 1792,
                "num_hidden_layers": 16,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "sliding_window": None,
            },
        ),
        # Its published config, but for the values of the rotary factors.
        Shape(
            "phi35",
            "Phi-3.5-mini, all of it: 3.8e9 parameters (rotary factors invented)",
            {
                **_PHI3,
                "max_position_embeddings": 131072,
                "sliding_window": 262144,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": _SHORT_FACTORS,
                    "long_factor": _LONG_FACTORS,
                },
            },
        ),
        Shape(
            "narrow",
            "22 layers of next to no width: what is left is overhead",
            {
                **_LLAMA,
                "vocab_size": 1024,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 22,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        ),
        Shape(
            "llama8b",
            "Llama of 8e9 parameters (Llama 3's sizes)",
            {
                **_LLAMA,
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
            },
        ),
    )
}
