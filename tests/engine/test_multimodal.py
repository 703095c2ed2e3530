"""Multimodal checkpoints: the language part runs on text, the rest is not even opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.stage_loading import load_stage
from proto.errors import ModelError
from tests.support.local_chain import cut, open_entry, split
from tests.support.models import VOCAB
from tests.support.multimodal import MODELS, TEXT, shaken_multimodal

PROMPT: list[int] = torch.randint(
    VOCAB - 8, (70,), generator=torch.Generator().manual_seed(8)
).tolist()


def saved(kind: str, folder: Path, **settings: Any) -> Any:
    model = shaken_multimodal(kind)
    model.save_pretrained(folder, **settings)
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([PROMPT])).logits[0]
    return logits


@pytest.mark.parametrize("num_sections", [1, 2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_text_comes_out_as_from_the_whole_model(
    kind: str, num_sections: int, tmp_path: Path
) -> None:
    model = saved(kind, tmp_path)
    chain = split(tmp_path, num_sections)
    ours = chain.prefill(PROMPT, chunk_tokens=27)
    assert float((ours - logits_of(model)).abs().max()) < 1e-4
    ids = torch.tensor([PROMPT])
    theirs = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )
    assert chain.generate([PROMPT], 10) == [theirs[0, len(PROMPT) :].tolist()]


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_but_the_language_part_is_read(kind: str, tmp_path: Path) -> None:
    """Every file without a tensor of the language part is gone."""
    model = saved(kind, tmp_path, max_shard_size="1KB")
    for path in tmp_path.glob("*.safetensors"):
        if all("vision" in key or "projector" in key for key in load_file(path)):
            path.unlink()
    chain = split(tmp_path, 2)
    assert float((chain.prefill(PROMPT) - logits_of_saved(kind)).abs().max()) < 1e-4
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    language = {id(it): it for it in [*model.get_decoder().parameters(), head]}
    held = sum(it.numel() for it in language.values())
    held -= 0 if head is embedding else embedding.numel()
    assert sum(stage.read_bytes for stage in chain.stages) == 4 * held


def logits_of_saved(kind: str) -> Tensor:
    model = shaken_multimodal(kind)
    model.set_attn_implementation("eager")
    return logits_of(model)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3"])
def test_the_language_part_is_found_under_another_prefix(kind: str, tmp_path: Path) -> None:
    """As the modules are named, where `save_pretrained` keeps to the names of earlier releases."""
    model = saved(kind, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert any(key.startswith("language_model.model.layers.") for key in tensors)
    renamed = {
        key.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head.", "lm_head.")
        .replace("vision_tower.", "model.vision_tower."): it
        for key, it in tensors.items()
    }
    save_file(renamed, path)
    chain = cut(tmp_path, [(0, 2), (2, 4)])
    assert float((chain.prefill(PROMPT) - logits_of(model)).abs().max()) < 1e-4


def test_layers_and_sizes_are_those_of_the_text_config(tmp_path: Path) -> None:
    saved("gemma3", tmp_path)
    entry = open_entry(tmp_path)
    stage = load_stage(str(tmp_path), layers=(0, 1), dtype="float32", device="cpu")
    for it in (entry, stage):
        assert (it.num_layers, it.hidden_size, it.vocab_size) == (4, 32, VOCAB)
    assert entry.fingerprint == stage.fingerprint


def test_a_layer_that_is_missing_is_said(tmp_path: Path) -> None:
    """The vision part's layers of the same number do not take its place."""
    saved("gemma3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {key: it for key, it in tensors.items() if "vision" in key or ".layers.1." not in key}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 13 tensors that Gemma3ForCausalLM needs"):
        load_stage(str(tmp_path), layers=(1, 2), dtype="float32")


def test_a_language_part_without_a_class_of_its_own_is_refused(tmp_path: Path) -> None:
    """Qwen2-VL: its text model cannot be told from the class that sees pictures."""
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    config = transformers.Qwen2VLConfig(text_config=text)
    config.save_pretrained(tmp_path)
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'qwen2_vl', for which transformers has no causal"):
        load_stage(str(tmp_path), layers=(0, 1))
