"""Which layers a section holds: the same answer on every worker, balanced by what layers cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.architecture import read_architecture
from engine.attention import ATTENTION_NAME, register
from engine.checkpoint import Checkpoint
from engine.plan import LayerSizes, layer_sizes, plan_section
from engine.stage_loading import load_stage
from proto.errors import SplitError, UsageError
from tests.support.models import KINDS, save_tiny


def sizes_of(folder: Path) -> LayerSizes:
    architecture = read_architecture(Checkpoint(str(folder)))
    register()
    return layer_sizes(architecture.build(torch.float32, ATTENTION_NAME), architecture)


def sections_of(folder: Path, num_sections: int) -> list[tuple[int, int]]:
    """Each worked out anew, as by workers that know nothing of each other."""
    sections = []
    for index in range(num_sections):
        architecture = read_architecture(Checkpoint(str(folder)))
        register()
        model = architecture.build(torch.float32, ATTENTION_NAME)
        sections.append(plan_section(model, architecture, sections=num_sections, index=index))
    return sections


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mixtral", "deepseek_v3", "gpt_oss"])
def test_sizes_are_those_of_the_tensors(kind: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path)
    sizes = sizes_of(tmp_path)
    layers = next(
        it
        for it in model.modules()
        if isinstance(it, torch.nn.ModuleList) and len(it) == model.config.num_hidden_layers
    )
    assert list(sizes.layer_bytes) == [
        sum(it.numel() * 4 for it in layer.parameters()) for layer in layers
    ]
    expected = [sum(it.numel() * 4 for it in layer.state_dict().values()) for layer in layers]
    held = [
        load_stage(str(tmp_path), layers=(layer, layer + 1), dtype="float32").stage_bytes
        for layer in range(4)
    ]
    assert held == [*expected[:3], expected[3] + sizes.head_bytes]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_the_last_sections_even_if_it_is_the_embedding(
    tied: bool, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path, tie_word_embeddings=tied)
    sizes = sizes_of(tmp_path)
    assert sizes.head_bytes == (128 * 32 + 32) * 4
    assert sizes.embedding_bytes == 128 * 32 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_sections_cover_every_layer_once(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    for num_sections in (1, 2, 3, 4):
        sections = sections_of(tmp_path, num_sections)
        covered = [layer for start, end in sections for layer in range(start, end)]
        assert covered == [0, 1, 2, 3]


def test_a_large_head_takes_layers_off_the_last_section(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_hidden_layers": 8}
    save_tiny("llama", tmp_path / "small_head", vocab_size=16, **settings)
    save_tiny("llama", tmp_path / "large_head", vocab_size=2000, **settings)
    assert sections_of(tmp_path / "small_head", 2) == [(0, 4), (4, 8)]
    (_, cut), (start, end) = sections_of(tmp_path / "large_head", 2)
    assert cut == start > 4
    assert end == 8


def test_no_cut_balances_bytes_better_where_work_is_bytes(tmp_path: Path) -> None:
    """A dense model: the largest section is as small as any cut can make it."""
    save_tiny("llama", tmp_path, num_hidden_layers=9, vocab_size=700)
    sizes = sizes_of(tmp_path)

    def largest(cuts: list[tuple[int, int]]) -> int:
        head = [0] * (len(cuts) - 1) + [sizes.head_bytes]
        return max(sum(sizes.layer_bytes[a:b]) + it for (a, b), it in zip(cuts, head, strict=True))

    every_cut = [[(0, a), (a, b), (b, 9)] for a in range(1, 8) for b in range(a + 1, 9)]
    assert largest(sections_of(tmp_path, 3)) == min(map(largest, every_cut))


def test_experts_count_as_the_part_that_a_token_uses(tmp_path: Path) -> None:
    save_tiny("qwen3_moe", tmp_path)  # 2 of 4 experts a token
    sizes = sizes_of(tmp_path)
    experts = 4 * 3 * 24 * 32 * 4
    for held, work in zip(sizes.layer_bytes, sizes.layer_work, strict=True):
        assert held - work == pytest.approx(experts / 2)


def test_the_plan_needs_no_weights_and_no_shards(tmp_path: Path) -> None:
    """A worker with nothing but its own shards comes to the same sections as one with all."""
    save_tiny("llama", tmp_path, max_shard_size="1KB")
    before = sections_of(tmp_path, 3)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert sections_of(tmp_path, 3) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_plan_does_not_depend_on_the_dtype(dtype: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=7, vocab_size=300)
    architecture = read_architecture(Checkpoint(str(tmp_path)))
    register()
    model = architecture.build(getattr(torch, dtype), ATTENTION_NAME)
    plans = [plan_section(model, architecture, sections=3, index=index) for index in range(3)]
    assert plans == sections_of(tmp_path, 3)


def test_layers_are_taken_as_they_are_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    architecture = read_architecture(Checkpoint(str(tmp_path)))
    model = architecture.build(torch.float32, ATTENTION_NAME)
    assert plan_section(model, architecture, layers=(1, 3)) == (1, 3)
    assert plan_section(model, architecture, layers="1:3") == (1, 3)
    for wrong in ("1-3", "1:", ":", "1:9", "3:3", "-1:2"):
        with pytest.raises(SplitError, match="--layers"):
            plan_section(model, architecture, layers=wrong)
    for halves in ({"sections": 2}, {"index": 0}, {}):
        with pytest.raises(UsageError, match="pass --sections N and --index I"):
            plan_section(model, architecture, **halves)


def test_a_config_says_how_many_layers_there_are(tmp_path: Path) -> None:
    """Fewer than the checkpoint has: the rest is never looked at."""
    save_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    assert sections_of(tmp_path, 3) == [(0, 1), (1, 2), (2, 3)]
    with pytest.raises(SplitError, match="cannot split 3 layers over 4 sections"):
        load_stage(str(tmp_path), sections=4, index=0)
