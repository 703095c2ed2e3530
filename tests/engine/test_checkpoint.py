"""However a checkpoint is stored it runs; of its bytes only a section's own are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.checkpoint import Checkpoint
from engine.stage_loading import load_stage
from proto.errors import ModelError
from tests.support.local_chain import cut, open_entry, split
from tests.support.memory import measured
from tests.support.models import VOCAB, save_tiny

PROMPT: list[int] = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ONE_TENSOR_A_FILE = "1KB"  # hidden sizes are so small that every matrix exceeds it


def whole_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0].float()
    return logits


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", ["5GB", "30KB", ONE_TENSOR_A_FILE])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_tied_or_not_in_one_file_or_many(
    kind: str, shards: str, tied: bool, tmp_path: Path
) -> None:
    model = save_tiny(kind, tmp_path, max_shard_size=shards, tie_word_embeddings=tied)
    assert (tmp_path / INDEX).exists() == (shards != "5GB")
    chain = split(tmp_path, 2)
    assert error(chain.prefill(PROMPT), whole_logits(model)) < 1e-4
    assert sum(stage.read_bytes for stage in chain.stages) == sum(
        stage.stage_bytes for stage in chain.stages
    )


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_matrix_may_be_stored_under_either_name(kept: str, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / SINGLE)
    matrix = tensors.pop("model.embed_tokens.weight")
    names = ["lm_head.weight", "model.embed_tokens.weight"] if kept == "both" else [kept]
    tensors.update({name: matrix.clone() for name in names})
    save_file(tensors, tmp_path / SINGLE)
    assert error(split(tmp_path, 2).prefill(PROMPT), whole_logits(model)) < 1e-4


def test_tensors_that_start_at_odd_bytes_are_read_too(tmp_path: Path) -> None:
    """The format asks writers to align the header; not all do."""
    model = save_tiny("llama", tmp_path)
    path = tmp_path / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)  # odd in any case
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert len(header) % 2
    assert error(split(tmp_path, 2).prefill(PROMPT), whole_logits(model)) < 1e-4


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_oss"])
def test_any_stored_dtype_runs_in_float32(kind: str, stored: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path, dtype=getattr(torch, stored))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    chain = split(tmp_path, 2, dtype="float32")
    assert {stage.dtype_name for stage in chain.stages} == {"float32"}
    assert error(chain.prefill(PROMPT, chunk_tokens=25), whole_logits(theirs)) < 1e-4


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_auto_runs_in_the_stored_dtype_as_exactly_as_transformers(
    kind: str, stored: str, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path, dtype=getattr(torch, stored))
    load = AutoModelForCausalLM.from_pretrained
    exact = whole_logits(load(tmp_path, dtype=torch.float32, attn_implementation="eager").eval())
    theirs = whole_logits(load(tmp_path, dtype="auto", attn_implementation="eager").eval())
    chain = split(tmp_path, 2, dtype="auto")
    assert {stage.dtype_name for stage in chain.stages} == {stored}
    assert chain.entry.dtype_name == stored
    ours = chain.prefill(PROMPT, chunk_tokens=25)
    assert ours.dtype == torch.float32
    # The median, since rounding may route one token of a mixture of experts elsewhere.
    rounding = (theirs - exact).norm(dim=1).median()
    assert (ours - exact).norm(dim=1).median() < 1.5 * rounding + 1e-4


# --- only one's own slice --------------------------------------------------------------------

SECTIONS = [(0, 1), (1, 3), (3, 4)]
Spoil = Callable[[Path, set[str]], None]  # makes every tensor but these unreadable


def delete_other_shards(folder: Path, own: set[str]) -> None:
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    needed = {files[key] for key in own}
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert len(needed) < len(set(files.values()))


def cut_other_shards_short(folder: Path, own: set[str]) -> None:
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    for file in set(files.values()) - {files[key] for key in own}:
        (folder / file).write_bytes(b"")


def fill_others_with_nan(folder: Path, own: set[str]) -> None:
    path = folder / SINGLE
    data = bytearray(path.read_bytes())
    for key, (start, stop) in places(folder).items():
        if key not in own:
            data[start:stop] = b"\xff" * (stop - start)
    path.write_bytes(data)


def end_behind_the_last_own_tensor(folder: Path, own: set[str]) -> None:
    stop = max(stop for key, (_, stop) in places(folder).items() if key in own)
    with (folder / SINGLE).open("r+b") as file:
        file.truncate(stop)


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """First and last byte of each tensor of a single file."""
    checkpoint = Checkpoint(str(folder))
    entries = {key: checkpoint.entry(key) for key in checkpoint}
    return {key: (it.offset, it.offset + it.num_bytes) for key, it in entries.items()}


SPOILERS = {
    "other shards are gone": (ONE_TENSOR_A_FILE, delete_other_shards),
    "other shards are empty": (ONE_TENSOR_A_FILE, cut_other_shards_short),
    "other tensors are garbage": ("5GB", fill_others_with_nan),
    "the file ends early": ("5GB", end_behind_the_last_own_tensor),
}


def own_tensors(folder: Path, start: int, end: int, num_layers: int = 4) -> set[str]:
    """What a section of a Llama needs, by the names that everybody knows."""
    own = set()
    tied = "lm_head.weight" not in Checkpoint(str(folder))
    for key in Checkpoint(str(folder)):
        if key.startswith(tuple(f"model.layers.{layer}." for layer in range(start, end))):
            own.add(key)
        tail = ["model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"]
        if end == num_layers and key in tail:
            own.add(key)
    return own


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize(("start", "end"), SECTIONS)
def test_a_stage_needs_its_own_tensors_only(
    start: int, end: int, spoiler: str, tied: bool, tmp_path: Path
) -> None:
    """What others hold is unreadable, and the stage computes the same as in a whole chain."""
    shards, spoil = SPOILERS[spoiler]
    model = save_tiny("llama", tmp_path / "whole", max_shard_size=shards, tie_word_embeddings=tied)
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tmp_path / "whole", spoilt)
    spoil(spoilt, own_tensors(spoilt, start, end))
    chain = cut(tmp_path / "whole", SECTIONS)
    place = SECTIONS.index((start, end))
    stage = load_stage(str(spoilt), layers=(start, end), dtype="float32", device="cpu")
    chain.stages[place] = stage
    chain.caches[place] = stage.new_cache(chain.num_blocks)
    assert error(chain.prefill(PROMPT), whole_logits(model)) < 1e-4
    assert stage.read_bytes == stage.stage_bytes == held_bytes(stage)
    assert stage.fingerprint == chain.stages[place - 1].fingerprint == chain.entry.fingerprint


def held_bytes(stage: Any) -> int:
    """Bytes of the parameters that the stage's model really has in memory."""
    model: torch.nn.Module = stage._model
    return sum(it.numel() * it.itemsize for it in model.parameters() if not it.is_meta)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "mixtral", "qwen3_moe", "gpt_oss", "phi3"])
def test_bytes_read_are_bytes_held(kind: str, tmp_path: Path) -> None:
    model = save_tiny(kind, tmp_path, tie_word_embeddings=False)
    stages = [load_stage(str(tmp_path), layers=it, dtype="auto", device="cpu") for it in SECTIONS]
    assert [it.read_bytes for it in stages] == [held_bytes(it) for it in stages]
    assert [it.stage_bytes for it in stages] == [held_bytes(it) for it in stages]
    all_bytes = sum(it.numel() * it.itemsize for it in model.parameters())
    embeddings = sum(it.numel() * it.itemsize for it in embedding_matrices(model))
    assert sum(it.read_bytes for it in stages) == all_bytes - embeddings


def embedding_matrices(model: Any) -> list[Tensor]:
    return [it.weight for it in model.modules() if isinstance(it, torch.nn.Embedding)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("spoiler", SPOILERS)
def test_the_manager_needs_the_embeddings_only(spoiler: str, tied: bool, tmp_path: Path) -> None:
    shards, spoil = SPOILERS[spoiler]
    model = save_tiny("llama", tmp_path, max_shard_size=shards, tie_word_embeddings=tied)
    spoil(tmp_path, {"model.embed_tokens.weight"})
    entry = open_entry(tmp_path)
    ours = entry.embed(PROMPT, range(len(PROMPT)))
    assert torch.equal(ours, model.model.embed_tokens(torch.tensor(PROMPT)))


def test_a_needed_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, max_shard_size=ONE_TENSOR_A_FILE)
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    missing = files["model.layers.2.mlp.up_proj.weight"]
    (tmp_path / missing).unlink()
    load_stage(str(tmp_path), layers=(0, 2), dtype="float32")
    with pytest.raises(ModelError, match=missing) as caught:
        load_stage(str(tmp_path), layers=(2, 4), dtype="float32")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shards", ["5GB", ONE_TENSOR_A_FILE])
def test_a_needed_tensor_that_is_cut_off_is_named_with_its_file(
    shards: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path, max_shard_size=shards)
    key = "model.layers.2.mlp.up_proj.weight"
    checkpoint = Checkpoint(str(tmp_path))
    entry = checkpoint.entry(key)
    path = tmp_path / entry.file
    with path.open("r+b") as file:
        file.truncate(entry.offset + entry.num_bytes - 1)
    with pytest.raises(ModelError) as caught:
        load_stage(str(tmp_path), layers=(2, 3), dtype="float32")
    said = str(caught.value)
    assert str(path) in said
    assert key in said or shards == "5GB"  # of one file, another tensor may miss its end first
    assert "truncated" in said and "\n" not in said


def test_an_embedding_that_is_cut_off_is_named_with_its_file(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, max_shard_size=ONE_TENSOR_A_FILE)
    entry = Checkpoint(str(tmp_path)).entry("model.embed_tokens.weight")
    with (tmp_path / entry.file).open("r+b") as file:
        file.truncate(entry.offset + 10)
    with pytest.raises(ModelError, match=r"truncated.*embed_tokens") as caught:
        open_entry(tmp_path)
    assert str(tmp_path / entry.file) in str(caught.value)


def test_fingerprints_tell_models_apart_and_not_copies(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "one")
    save_tiny("llama", tmp_path / "copy")
    save_tiny("llama", tmp_path / "other", rope_theta=20000.0)
    save_tiny("llama", tmp_path / "wider", intermediate_size=64)
    one, copy, other, wider = (
        Checkpoint(str(tmp_path / name)).fingerprint for name in ("one", "copy", "other", "wider")
    )
    assert one == copy
    assert len({one, other, wider}) == 3


def test_progress_counts_every_byte_up_to_the_total(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    seen: list[tuple[int, int]] = []
    stage = load_stage(
        str(tmp_path), layers=(1, 4), dtype="float32", progress=lambda *it: seen.append(it)
    )
    assert {total for _, total in seen} == {stage.read_bytes}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (stage.read_bytes, stage.read_bytes)
    assert len(seen) > 10


def test_copies_that_are_cut_into_other_files_count_as_different(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "single")
    save_tiny("llama", tmp_path / "sharded", max_shard_size=ONE_TENSOR_A_FILE)
    single, sharded = Checkpoint(str(tmp_path / "single")), Checkpoint(str(tmp_path / "sharded"))
    assert single.fingerprint != sharded.fingerprint


LOAD = """
from engine.stage_loading import load_stage
load_stage(sys.argv[1], layers=(0, 4), dtype=sys.argv[3], device="cpu")  # imports, first uses
start()
stage = load_stage(sys.argv[2], layers=(0, 4), dtype=sys.argv[3], device="cpu")
print(growth(), stage.stage_bytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_loading_needs_memory_for_the_stage_and_one_parameter(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """Half of 120 MiB, stored in float32; a parameter of Mixtral stacks all experts of a layer."""
    save_tiny(kind, tmp_path / "small")
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    if kind == "mixtral":
        sizes |= {"num_hidden_layers": 6, "intermediate_size": 1024}
    model = save_tiny(kind, tmp_path / "large", **sizes)
    parameters = [it.numel() * 4 for it in model.parameters()]
    assert sum(parameters) > 120 * 2**20
    peak, stage_bytes = measured(LOAD, tmp_path / "small", tmp_path / "large", dtype)
    print(f"{kind} {dtype}: peak {peak} bytes for a stage of {stage_bytes}")  # pytest -rP shows it
    assert peak > 0.9 * stage_bytes
    # The parameter's sources as they are stored, and the parameter made of them.
    assert peak < stage_bytes + 2 * max(parameters) + 12 * 2**20
