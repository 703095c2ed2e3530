"""The manager's part of a checkpoint: embeddings, tokenizer, end tokens; never a decoder layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from engine.entry import load_entry
from tests.support.local_chain import open_entry
from tests.support.memory import measured
from tests.support.models import VOCAB, save_tiny
from tests.support.tokenizers import save_tokenizer

IDS = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(5))
KINDS = ["llama", "gpt2", "gemma2", "gemma3", "granite", "opt", "opt_projected", "gpt_bigcode"]


class Stop(Exception):
    """What the first layer would have got."""


def before_layer_0(model: Any, ids: Tensor) -> Tensor:
    """What transformers itself feeds into the first layer: (tokens, hidden_size)."""
    layers = next(
        it
        for it in model.modules()
        if isinstance(it, nn.ModuleList) and len(it) == model.config.num_hidden_layers
    )
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Tensor, ...], settings: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else settings["hidden_states"])
        raise Stop

    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), pytest.raises(Stop):
        model(ids[None], use_cache=False)
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_first_layer_wants(kind: str, dtype: str, tmp_path: Path) -> None:
    """Embeddings, learned positions, scales, projections: whatever the model does there."""
    model = save_tiny(kind, tmp_path, dtype=getattr(torch, dtype))
    entry = open_entry(tmp_path, dtype)
    ours = entry.embed(IDS, range(len(IDS)))
    assert ours.dtype == getattr(torch, dtype)
    assert torch.equal(ours, before_layer_0(model, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_many_sequences_mix_in_any_order(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path)
    entry = open_entry(tmp_path)
    whole = entry.embed(IDS, range(len(IDS)))
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(6))
    mixed = entry.embed(torch.cat([IDS[order], IDS[:3]]), torch.cat([order, torch.arange(3)]))
    assert torch.allclose(mixed, torch.cat([whole[order], whole[:3]]), atol=1e-6)
    one = entry.embed([int(IDS[17])], [17])
    assert torch.allclose(one, whole[17:18], atol=1e-6)


def test_a_dtype_other_than_the_checkpoints(tmp_path: Path) -> None:
    save_tiny("gemma2", tmp_path, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = open_entry(tmp_path, "float32").embed(IDS, range(len(IDS)))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, before_layer_0(model, IDS))


def test_it_holds_no_decoder_layer(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    entry = open_entry(tmp_path)
    real = [name for name, it in entry._model.named_parameters() if not it.is_meta]
    assert real == ["model.embed_tokens.weight"]
    assert entry.checkpoint.read_bytes == 0  # mapped, not read


def test_it_says_what_the_workers_say(tmp_path: Path) -> None:
    from engine.stage_loading import load_stage

    save_tiny("llama", tmp_path)
    entry = open_entry(tmp_path)
    stage = load_stage(str(tmp_path), layers=(0, 1), dtype="float32", device="cpu")
    for name in (
        "model_name",
        "fingerprint",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "max_context",
        "dtype_name",
    ):
        assert getattr(entry, name) == getattr(stage, name), name


@pytest.mark.parametrize(
    ("kind", "switch"), [("phi35_longrope", 64), ("llama", None), ("llama3_rope", None)]
)
def test_it_knows_where_longrope_changes_its_factors(
    kind: str, switch: int | None, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path)
    assert open_entry(tmp_path).rope_switch == switch


def test_prompts_share_their_beginnings_unless_their_keys_differ(tmp_path: Path) -> None:
    save_tiny("llama_dynamic_rope", tmp_path / "dynamic")
    save_tiny("llama", tmp_path / "plain")
    dynamic, plain = open_entry(tmp_path / "dynamic"), open_entry(tmp_path / "plain")
    assert {plain.prompt_salt(length) for length in (1, 64, 65, 200)} == {0}
    assert {dynamic.prompt_salt(length) for length in (1, 63, 64)} == {0}
    assert len({dynamic.prompt_salt(length) for length in (64, 65, 66, 200)}) == 4


# --- tokens that end a text ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9]}, 5, {7, 9}),
        ({"eos_token_id": 7}, 5, {7}),
        ({}, 5, {5}),
        ({}, [5, 6], {5, 6}),
        (None, 5, {5}),
        (None, None, set()),
        ({"eos_token_id": None}, None, set()),
        ({"eos_token_id": 0}, None, {0}),
    ],
    ids=str,
)
def test_end_tokens_come_from_the_first_file_that_names_any(
    generation: dict[str, Any] | None, config: Any, expected: set[int], tmp_path: Path
) -> None:
    """generation_config.json, then config.json; the tokenizer's own end token besides."""
    save_tiny("llama", tmp_path)
    tokenizer = save_tokenizer(tmp_path, 300)
    change(tmp_path / "config.json", eos_token_id=config)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    entry = load_entry(str(tmp_path), dtype="float32")
    assert entry.eos_token_ids == expected | {tokenizer.eos_token_id}


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_tokenizer_is_the_checkpoints_own(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    tokenizer = save_tokenizer(tmp_path, 300, chat=True)
    entry = load_entry(str(tmp_path), dtype="float32")
    assert entry.tokenizer.encode("Olá, Zürich!") == tokenizer.encode("Olá, Zürich!")
    assert entry.tokenizer.chat_template == tokenizer.chat_template


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    """`auto_map` names Python files of the checkpoint; they stay text."""
    save_tiny("llama", tmp_path)
    save_tokenizer(tmp_path, 300)
    mark = tmp_path / "it_ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    classes = {
        "AutoConfig": "evil.C",
        "AutoModelForCausalLM": "evil.M",
        "AutoTokenizer": ["evil.T", None],
    }
    change(tmp_path / "config.json", auto_map=classes)
    change(tmp_path / "tokenizer_config.json", auto_map=classes)
    load_entry(str(tmp_path), dtype="float32")
    assert not mark.exists()


OPEN = """
from engine.entry import load_entry
load_entry(sys.argv[1], dtype="bfloat16")  # imports, first uses
start()
entry = load_entry(sys.argv[2], dtype="bfloat16")
entry.embed(range(100), range(100))
print(growth())
"""


def test_a_large_checkpoint_costs_the_manager_next_to_no_memory(tmp_path: Path) -> None:
    """64 MiB of embeddings are mapped: only the rows that are used come in."""
    save_tiny("llama", tmp_path / "small")
    save_tokenizer(tmp_path / "small", 300)
    large = {"vocab_size": 2**20, "tie_word_embeddings": True}
    save_tiny("llama", tmp_path / "large", dtype=torch.bfloat16, **large)
    save_tokenizer(tmp_path / "large", 300)
    (peak,) = measured(OPEN, tmp_path / "small", tmp_path / "large")
    assert peak < 24 * 2**20
