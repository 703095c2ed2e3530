"""Tiny random multimodal models, whose language part is one of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.support.models import VOCAB, shaken

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,  # as many as the language part: counting layers is not enough
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def gemma3() -> Any:
    """The layout of Gemma 3 4B: windows, two rotary tables, tied head."""
    config = transformers.Gemma3Config(
        text_config={
            **TEXT,
            "model_type": "gemma3_text",
            "sliding_window": 16,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
            ],
        },
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    """Llama's language part under a prefix, with a head of its own."""
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": False},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=VOCAB - 1,
        tie_word_embeddings=False,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mistral3() -> Any:
    config = transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "tie_word_embeddings": False},
        vision_config={**VISION, "model_type": "pixtral"},
        image_token_index=VOCAB - 1,
        tie_word_embeddings=False,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def idefics3() -> Any:
    """A prefix of another name, and a head that only the whole's config calls tied."""
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "tie_word_embeddings": False},
        vision_config={**VISION, "model_type": "idefics3_vision"},
        image_token_id=VOCAB - 1,
        scale_factor=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def llama4() -> Any:
    """Experts, chunked attention, layers without rope."""
    text = {
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 16,
    }
    vision = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    config = transformers.Llama4Config(
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision},
        image_token_index=VOCAB - 1,
    )
    return transformers.Llama4ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "llava": llava,
    "mistral3": mistral3,
    "idefics3": idefics3,
    "llama4": llama4,
}


def shaken_multimodal(kind: str) -> Any:
    """A model with random weights that show every mistake."""
    torch.manual_seed(0)
    return shaken(MODELS[kind]())
