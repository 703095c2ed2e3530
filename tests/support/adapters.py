"""LoRA adapters made by peft with matrices drawn at random, and peft's own results with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Large enough that an adapter which is missing, or of another sequence, gives other tokens; small
# enough that rounding stays where the plain model has it.
SPREAD = 0.15


def adapted(
    model: Any, folder: Path, *, seed: int = 1, spread: float = SPREAD, **settings: Any
) -> Any:
    """Put an adapter beside a model, save it into `folder`, and return peft's model.

    Args:
        model: left as it is: peft's model has one of its own.
        settings: of peft's LoraConfig.
    """
    import copy

    import peft

    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = peft.get_peft_model(copy.deepcopy(model), config)
        shake(result, seed, spread)
        result.save_pretrained(folder, save_embedding_layers=False)
    return result.eval()


def loaded_by_peft(model: Path, adapter: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The plain model, and peft's with the adapter, as a program loads them from their folders."""
    import peft
    import transformers

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="eager"
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(), peft.PeftModel.from_pretrained(load(), adapter).eval()


def shake(model: Any, seed: int, spread: float = SPREAD) -> None:
    """Give every matrix of an adapter values of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + spread * noise)
            elif "lora_" in name:
                parameter.copy_(spread * noise)


def logits_of(model: Any, prompt: Sequence[int]) -> Tensor:
    """(tokens, vocab_size), as peft computes them."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(prompt)])).logits[0]
    return logits


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What peft's own generate continues with."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def change_config(folder: Path, **values: Any) -> None:
    """Write other values into an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
