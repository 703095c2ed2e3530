"""Adapters on stages: equal to peft, for each sequence whatever its neighbours use."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.adapter_files import AdapterFiles
from engine.adapters import load_adapter, read_adapter
from engine.attention import StageRun
from engine.lora_layers import Adapter
from engine.selfcheck import relative_error
from tests.support.adapters import adapted, greedy, loaded_by_peft, logits_of
from tests.support.local_chain import Chain, split
from tests.support.models import VOCAB, save_tiny

KINDS = ("llama", "phi3", "gpt2", "qwen3_moe", "gemma3", "gemma4", "qwen2_moe", "opt_projected")
# Where all linear layers of the model are more than can be adapted: experts, and what the manager
# runs before the first layer.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"target_modules": ATTENTION},
    "qwen2_moe": {
        "target_modules": [*ATTENTION, "shared_expert_gate", "shared_expert.up_proj"],
    },
    "opt_projected": {"target_modules": ["q_proj", "v_proj", "fc1", "fc2", "project_out"]},
}
# Ways of applying an adapter that one architecture is enough to tell apart.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "dora_on_biases": ("llama_biases", {"use_dora": True}),
    "dora_on_transposed_weights": ("gpt2", {"use_dora": True}),
    "biases_of_its_own": ("llama", {"lora_bias": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.*": 6, r"layers\.\d+\.mlp": 9},
            "alpha_pattern": {"v_proj": 3, "layers.2.self_attn.q_proj": 11},
        },
    ),
    "some_layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [3]}),
    "the_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "a_tied_head": ("qwen2", {"target_modules": ["v_proj", "lm_head"]}),
    "the_head_of_dora": ("gpt2", {"target_modules": ["c_attn", "lm_head"], "use_dora": True}),
    "gaussian_start": ("llama", {"init_lora_weights": "gaussian"}),
}
TOLERANCE = 1e-4


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (num_tokens,), generator=generator).tolist()


PROMPTS = [prompt_of(seed, length) for seed, length in ((1, 40), (2, 7), (3, 23), (4, 16))]


@dataclass
class Adapted:
    """A chain of stages, the plain model, and adapters with peft's models of them."""

    chain: Chain
    plain: Any
    peft: list[Any]
    adapters: list[list[Adapter]]  # by adapter, then by stage

    def logits(self, prompts: Sequence[Sequence[int]], users: Sequence[int | None]) -> list[Tensor]:
        """Of all prompts in one step, each with the adapter of its number."""
        longest = max(map(len, prompts))
        tables = self.chain.scattered(len(prompts), longest)
        token_ids = torch.tensor([token for prompt in prompts for token in prompt])
        positions = [at for prompt in prompts for at in range(len(prompt))]
        hidden = self.chain.entry.embed(token_ids, positions)
        for at, (stage, cache) in enumerate(zip(self.chain.stages, self.chain.caches, strict=True)):
            runs = [
                StageRun(
                    start=0,
                    num_tokens=len(prompt),
                    rope_length=len(prompt),
                    blocks=torch.tensor(table),
                    adapter=None if user is None else self.adapters[user][at],
                )
                for prompt, table, user in zip(prompts, tables, users, strict=True)
            ]
            hidden = stage.forward(token_ids, hidden, runs, cache)
        rows = [run.adapter for run in runs for _ in range(run.num_tokens)]
        logits = self.chain.stages[-1].logits(hidden, rows)
        return list(logits.split([len(prompt) for prompt in prompts]))

    def expected(self, prompt: Sequence[int], user: int | None) -> Tensor:
        return logits_of(self.plain if user is None else self.peft[user], prompt)


def serve(
    folder: Path, kind: str, sections: int, *settings: dict[str, Any], **overrides: Any
) -> Adapted:
    """A model in so many sections, with one adapter of each of these settings."""
    plain = save_tiny(kind, folder / "model", **overrides)
    models = [
        adapted(plain, folder / f"adapter{at}", seed=at, **it) for at, it in enumerate(settings)
    ]
    chain = split(folder / "model", sections)
    loaded = [
        [load_adapter(str(folder / f"adapter{at}"), stage) for stage in chain.stages]
        for at in range(len(settings))
    ]
    return Adapted(chain, plain, models, loaded)


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("sections", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_one_step_get_what_peft_gives_each_of_them(kind, sections, tmp_path):
    settings = SETTINGS.get(kind, {"target_modules": layer_modules(kind)})
    served = serve(tmp_path, kind, sections, settings, {**settings, "r": 3, "lora_alpha": 5})
    users = [0, None, 1, 0]
    for prompt, user, ours in zip(PROMPTS, users, served.logits(PROMPTS, users), strict=True):
        assert largest_difference(ours, served.expected(prompt, user)) < TOLERANCE
    # With adapters or without, the tokens are others: nothing was passed over.
    assert largest_difference(served.expected(PROMPTS[0], 0), served.expected(PROMPTS[0], 1)) > 0.1


def layer_modules(kind: str) -> Any:
    return {"gemma4": [*ATTENTION, "up_proj", "per_layer_input_gate"]}.get(kind, "all-linear")


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_way_of_applying_an_adapter_is_as_in_peft(variant, tmp_path):
    kind, settings = VARIANTS[variant]
    served = serve(tmp_path, kind, 2, settings)
    ours = served.logits(PROMPTS, [0, None, 0, None])
    for prompt, user, logits in zip(PROMPTS, (0, None, 0, None), ours, strict=True):
        assert largest_difference(logits, served.expected(prompt, user)) < TOLERANCE
    assert largest_difference(served.expected(PROMPTS[0], 0), served.expected(PROMPTS[0], None)) > (
        0.01
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_tokens_are_those_of_peft_s_own_generate(kind, tmp_path):
    served = serve(tmp_path, kind, 2, {}, {"use_rslora": True})
    users = [0, 1, None, 0]
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(8):
        for text, logits in zip(texts, served.logits(texts, users), strict=True):
            text.append(int(logits[-1].argmax()))
    models = [served.plain if user is None else served.peft[user] for user in users]
    assert [text[-8:] for text in texts] == [
        greedy(model, prompt, 8) for model, prompt in zip(models, PROMPTS, strict=True)
    ]


def test_who_else_is_in_the_step_changes_nothing(tmp_path):
    served = serve(tmp_path, "llama", 2, {}, {"r": 2})
    alone = served.logits(PROMPTS[:1], [0])[0]
    for others in ([None, None, None], [0, 0, 0], [1, 0, 1], [1, 1, None]):
        together = served.logits(PROMPTS, [0, *others])[0]
        assert largest_difference(alone, together) < 2e-5


def test_a_step_without_adapters_runs_the_model_as_it_was_loaded(tmp_path):
    """No module is wrapped: with adapters loaded, between steps, and after a step that failed."""
    served = serve(tmp_path, "llama", 1, {})
    stage = served.chain.stages[0]
    assert untouched(stage)
    before = served.logits(PROMPTS, [None] * 4)
    served.logits(PROMPTS, [0] * 4)
    assert untouched(stage)
    with pytest.raises(IndexError):
        served.logits([[*PROMPTS[0][:3], VOCAB + 1]], [0])
    assert untouched(stage)
    assert all(
        torch.equal(a, b) for a, b in zip(before, served.logits(PROMPTS, [None] * 4), strict=True)
    )


def untouched(stage: Any) -> bool:
    return not any(
        "forward" in vars(it) or it._forward_hooks or it._forward_pre_hooks
        for it in stage.modules()
    )


@pytest.mark.parametrize("sections", [1, 2, 4])
def test_each_stage_reads_its_own_layers_part_and_no_more(sections, tmp_path):
    served = serve(tmp_path, "llama", sections, {"target_modules": ["q_proj", "lm_head"]})
    whole = load_file(tmp_path / "adapter0" / "adapter_model.safetensors")
    read = []
    for stage, adapter in zip(served.chain.stages, served.adapters[0], strict=True):
        files = AdapterFiles(tmp_path / "adapter0")
        assert files.read_bytes == 0
        read_adapter(files, stage.places, stage.device)
        assert files.read_bytes == adapter.num_bytes
        read.append(files.read_bytes)
    assert sum(read) == sum(it.numel() * 4 for it in whole.values())
    assert len(served.adapters[0][-1].layers) == 4 // sections + 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_an_adapter_is_held_and_applied_in_float32_as_peft_does(dtype, tmp_path):
    torch_dtype = getattr(torch, dtype)
    plain = save_tiny("llama", tmp_path / "model", dtype=torch_dtype)
    adapted(plain.float(), tmp_path / "adapter", use_dora=True)
    base, theirs = loaded_by_peft(tmp_path / "model", tmp_path / "adapter", torch_dtype)
    chain = split(tmp_path / "model", 1, dtype=dtype)
    adapter = load_adapter(str(tmp_path / "adapter"), chain.stages[0])
    served = Adapted(chain, base, [theirs], [[adapter]])
    users = (0, None)
    errors = [
        relative_error(ours, served.expected(PROMPTS[0], user).float())
        for user, ours in zip(users, served.logits(PROMPTS[:1] * 2, users), strict=True)
    ]
    # Rounding in the plain model, by another order of its sums, is as large.
    assert errors[0] < 2 * errors[1]
    assert all(layer.first.dtype == torch.float32 for layer in adapter.layers.values())


def test_an_adapter_that_changes_what_only_stages_run_before_their_layers_is_served(tmp_path):
    """Gemma 4 feeds every layer from the token ids, through a projection of its own."""
    settings = {"target_modules": ["q_proj", "per_layer_model_projection"]}
    served = serve(tmp_path, "gemma4", 2, settings)
    ours = served.logits(PROMPTS, [0, None, 0, None])
    for prompt, user, logits in zip(PROMPTS, (0, None, 0, None), ours, strict=True):
        assert largest_difference(logits, served.expected(prompt, user)) < TOLERANCE


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    model = save_tiny("llama", tmp_path / "model")
    adapted(model, tmp_path / "one", seed=1)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    adapted(model, tmp_path / "trained_anew", seed=2)
    prints = {name: AdapterFiles(tmp_path / name).fingerprint for name in ("one", "copy")}
    assert prints["one"] == prints["copy"]
    assert AdapterFiles(tmp_path / "trained_anew").fingerprint != prints["one"]
