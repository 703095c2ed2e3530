"""Tiny random checkpoints of many architectures, saved as people save theirs.

A kind is an architecture, or a setting of one that takes another path through its code. Windows,
rotary tables and chunks are made so small that prompts of 200 tokens exceed them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 128

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}

Recipe = tuple[str, dict[str, Any]]  # config class, what differs from the base

# What users are promised by name.
PROMISED: dict[str, Recipe] = {
    "gpt2": ("GPT2Config", {"n_positions": 512, "tie_word_embeddings": True}),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5}),
    "llama": ("LlamaConfig", {}),
    "llama3_rope": (
        "LlamaConfig",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi35_longrope": (
        "Phi3Config",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "starcoder2": ("Starcoder2Config", {"tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2Config",
        {"sliding_window": 16, "logit_scale": 0.5, "tie_word_embeddings": True},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_MOE, "num_local_experts": 4, "head_dim": 8, "sliding_window": 16},
    ),
}

# A check that nothing was fitted to those above.
OTHERS: dict[str, Recipe] = {
    "llama_dynamic_rope": (
        "LlamaConfig",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "llama_yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("LlamaConfig", {"head_dim": 24, "num_key_value_heads": 1}),
    "gpt2_scaled_by_layer": (
        "GPT2Config",
        {"n_positions": 512, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_neox_sequential": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "qwen2_some_windows": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    ),
    "phi3_window": ("Phi3Config", {"sliding_window": 24}),
    "starcoder2_window": ("Starcoder2Config", {"sliding_window": 24}),
    "mixtral_window": ("MixtralConfig", {**_MOE, "num_local_experts": 4, "sliding_window": 24}),
    "gemma": ("GemmaConfig", {"head_dim": 8, "tie_word_embeddings": True}),
    "olmo": ("OlmoConfig", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}),
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_MOE,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "stablelm": ("StableLmConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "glm": ("GlmConfig", {"head_dim": 8}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
    "exaone4": ("Exaone4Config", {"sliding_window": 16}),
    "helium": ("HeliumConfig", {"head_dim": 8}),
    "nemotron": ("NemotronConfig", {}),
    "phimoe": ("PhimoeConfig", {**_MOE, "num_local_experts": 4, "sliding_window": 24}),
    "granitemoe": ("GraniteMoeConfig", {**_MOE, "num_local_experts": 4}),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "sliding_window": 16,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "vaultgemma": ("VaultGemmaConfig", {"head_dim": 8, "sliding_window": 16}),
    "hunyuan": ("HunYuanDenseV1Config", {"head_dim": 8}),
    "nanochat": ("NanoChatConfig", {}),
    "persimmon": ("PersimmonConfig", {}),
    "biogpt": ("BioGptConfig", {}),
    "diffllama": ("DiffLlamaConfig", {}),
    "ernie4_5": ("Ernie4_5Config", {"tie_word_embeddings": True}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 8}),
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_positions": 512, "tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True}),
    "opt_projected": (
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "tie_word_embeddings": True},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_MOE,
            "num_experts_per_tok": 1,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "attention_chunk_size": 16,
        },
    ),
}

KINDS = PROMISED | OTHERS


def tiny_config(kind: str, **overrides: Any) -> Any:
    """The config of one kind; see KINDS."""
    name, changes = KINDS[kind]
    settings = {**_BASE, **changes, **overrides}
    return getattr(transformers, name)(**settings)


def tiny_model(kind: str, **overrides: Any) -> Any:
    """A float32 model with random weights that are large enough to make tokens differ."""
    torch.manual_seed(0)
    # "eager" is the arithmetic that the library's own tests take as the truth.
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_config(kind, **overrides), dtype=torch.float32, attn_implementation="eager"
    )
    return shaken(model)


def shaken(model: Any) -> Any:
    """The model with random weights that show every mistake, ready for inference."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library's start values leave every layer near the identity: a wrong layer would
            # not show. Biases, norms and sinks start at constants, and would not show either.
            spread = 0.3 if parameter.ndim > 1 else 0.1
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(float(is_norm) + spread * torch.randn(parameter.shape))
    return model.eval()


def save_tiny(
    kind: str, folder: Path, *, max_shard_size: str = "5GB", dtype: Any = None, **overrides: Any
) -> Any:
    """Save a tiny checkpoint (no tokenizer) into `folder` and return the model as saved."""
    model = tiny_model(kind, **overrides)
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
