"""Layers of known form run with fewer calls; whatever is not known for sure runs as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention import StageRun
from engine.joined_linear import join_siblings, joined_of
from engine.kernels import native
from engine.lean.agreement import agrees
from engine.lean.fitting import fit_layers
from engine.stage import Stage
from engine.stage_loading import load_stage
from tests.support.models import save_tiny

# The forms that most people's models have.
LEAN = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "phi35_longrope",
    "gemma2",
    "gemma3",
    "olmo2",
    "granite",
    "gpt2",
    "gpt_neox",
    "starcoder2",
    "cohere2",
    "glm4",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
]


@pytest.mark.parametrize("kind", LEAN)
def test_layers_of_the_usual_forms_run_lean(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load_stage(str(tmp_path), sections=2, index=0, dtype="bfloat16")
    assert stage.plain_layers == []


@pytest.mark.parametrize("kind", ["diffllama", "llama4", "deepseek_v3", "gemma4"])
def test_layers_of_another_form_run_as_the_library_wrote_them(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    stage = load_stage(str(tmp_path), sections=2, index=1, dtype="bfloat16")
    assert stage.plain_layers == list(range(stage.start_layer, stage.end_layer))


def test_a_setting_that_only_shows_at_other_numbers_keeps_a_layer_as_it_is(tmp_path: Path) -> None:
    # Clipped queries come out alike wherever none is large enough to be clipped.
    save_tiny("olmo", tmp_path, clip_qkv=1e6)
    stage = load_stage(str(tmp_path), sections=1, index=0, dtype="bfloat16")
    assert stage.plain_layers == [0, 1, 2, 3]


def test_layers_in_float32_run_as_the_library_wrote_them(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    assert load_stage(str(tmp_path), sections=1, index=0).plain_layers == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral"])
def test_bfloat16_layers_are_as_near_the_exact_model_as_the_librarys_own(
    kind: str, tmp_path: Path
) -> None:
    """Against the same model in float32: lean layers lose no more than the library's do."""
    save_tiny(kind, tmp_path, dtype=torch.bfloat16)
    lean = load_stage(str(tmp_path), sections=1, index=0, dtype="bfloat16")
    plain = load_stage(str(tmp_path), sections=1, index=0, dtype="bfloat16")
    plain.run_plainly()
    exact = load_stage(str(tmp_path), sections=1, index=0, dtype="float32")
    generator = torch.Generator().manual_seed(3)
    lost = {lean: 0.0, plain: 0.0}
    for num_tokens in (1, 1, 5, 5, 40):
        hidden = torch.randn(num_tokens, exact.hidden_size, generator=generator).bfloat16()
        truth = _run(exact, hidden.float())
        for stage in lost:
            error = (_run(stage, hidden).float() - truth).norm() / truth.norm()
            lost[stage] += float(error)
    assert lost[lean] <= 1.25 * lost[plain]


def _run(stage: Stage, hidden: torch.Tensor) -> torch.Tensor:
    run = StageRun(start=0, num_tokens=len(hidden), rope_length=len(hidden), blocks=torch.arange(4))
    return stage.forward(torch.arange(len(hidden)) % 50, hidden, [run], stage.new_cache(4))


# --- what a GPU multiplies in one call -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama_biases", "phi3", "gpt2"])
def test_weights_of_siblings_can_be_parts_of_one(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    with native.chosen("torch"):  # which leaves the model's own linear modules, as a GPU does
        stage = load_stage(str(tmp_path), sections=1, index=0, dtype="bfloat16", device="cpu")
        lean = _run(stage, hidden)
        stage.run_plainly()
        plain = _run(stage, hidden)
        groups = join_siblings(stage.modules())
        assert groups == (8 if kind.startswith("llama") else 0)  # two a layer
        assert torch.equal(_run(stage, hidden), plain)
        fit_layers(stage)
        assert stage.plain_layers == []
        assert agrees(_run(stage, hidden), lean)
    if groups:
        attention: Any = stage.slots[0].inner.self_attn
        joined = joined_of(attention)["qkv"]
        assert attention.k_proj.weight.data_ptr() == joined.matrix.weight[32:].data_ptr()
        stage.unload()
        assert joined.matrix.weight.numel() == 0
