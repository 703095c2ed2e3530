"""What is no adapter, no adapter of this model, or of a kind that is not applied: one sentence."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapter_files import AdapterFiles
from engine.adapters import load_adapter
from engine.attention import StageRun
from engine.stage import Stage
from engine.stage_loading import load_stage
from proto.errors import AdapterError
from tests.support.adapters import adapted, change_config, logits_of
from tests.support.local_chain import split
from tests.support.models import save_tiny, tiny_model
from tests.support.multimodal import shaken_multimodal


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The first section of a Llama of 4 layers."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny("llama", folder)
    return load_stage(str(folder), sections=2, index=0, device="cpu")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter that fits it, to be spoilt."""
    adapted(tiny_model("llama"), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    return tmp_path / "adapter"


def refusal(folder: Path, stage: Stage) -> str:
    with pytest.raises(AdapterError) as refused:
        load_adapter(str(folder), stage)
    sentence = str(refused.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


# --- the folder ------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_refused(tmp_path, stage):
    assert f"{tmp_path / 'nowhere'} is not there" in refusal(tmp_path / "nowhere", stage)


def test_a_file_is_refused(adapter, stage):
    assert "is no folder" in refusal(adapter / "adapter_config.json", stage)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_one_of_the_files_is_refused(missing, adapter, stage):
    (adapter / missing).unlink()
    assert f"holds no {missing}" in refusal(adapter, stage)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(adapter, stage):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    sentence = refusal(adapter, stage)
    assert "pickled weights are never loaded" in sentence
    assert "save_pretrained(NEW_DIR)" in sentence


def test_the_folder_of_a_training_run_is_answered_with_where_its_adapter_lies(adapter, stage):
    run = adapter.parent / "run"
    run.mkdir()
    adapter.rename(run / "lora_adapters")
    assert f"lies in {run / 'lora_adapters'}" in refusal(run, stage)


# --- the config ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3"'),
        ({"peft_type": None}, "peft_type is null"),
        ({"task_type": "SEQ_CLS"}, 'task_type is "SEQ_CLS"'),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save is ["lm_head"]'),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is [5]"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication is"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights is "pissa_niter_16"'),
        ({"alora_invocation_tokens": [1, 2]}, "applies only behind certain tokens"),
        ({"use_qalora": True}, "use_qalora is true"),
        ({"setting_of_a_later_release": {"x": 1}}, "setting_of_a_later_release is"),
        ({"use_dora": True}, "lacks the magnitude"),
        ({"use_dora": True, "lora_bias": True}, "cannot be applied together"),
        ({"lora_bias": True}, "lacks the bias"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is true"),
        ({"r": "4"}, 'r is "4"'),
        ({"r": 10**9}, "from 1 to 65536"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"rank_pattern": [4]}, "rank_pattern is [4]"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern['q_proj'] is 2.5"),
        ({"alpha_pattern": {"(": 2}}, "has the pattern '('"),
        ({"alpha_pattern": {"(?i)q": 2}}, "has the pattern '(?i)q'"),
        ({"alpha_pattern": {"a" * 600: 2}}, "more than 512 characters"),
        ({"lora_alpha": 10**400}, "it takes a finite number"),
        ({"r": 8}, "rank 8 in its config"),
        ({"rank_pattern": {"v_proj": 2}}, "rank 2 in its config"),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_config_that_asks_for_something_else_is_refused_by_name(values, words, adapter, stage):
    change_config(adapter, **values)
    assert words in refusal(adapter, stage)


@pytest.mark.parametrize(
    "pattern",
    ["(q|k)_proj", "(?:q|k)_proj", r"^model\.layers\.[0-2]\.self_attn\..*", r"layers\.\d+\.mlp"],
)
def test_patterns_that_people_write_are_taken(pattern, adapter, stage):
    change_config(adapter, alpha_pattern={pattern: 3})
    load_adapter(str(adapter), stage)


def test_a_tensor_with_an_endless_name_is_refused(adapter, stage):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model." + "a." * 5000 + "lora_A.weight"] = torch.zeros(4, 4)
    save_file(tensors, path)
    assert "has a name that nobody can read or write" in refusal(adapter, stage)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 100_000, b"\xff"])
def test_a_config_that_is_no_json_object_is_refused(text, adapter, stage):
    path = adapter / "adapter_config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in refusal(adapter, stage)


def test_settings_that_say_how_it_was_trained_are_no_obstacle(adapter, stage):
    change_config(adapter, lora_dropout=0.1, exclude_modules=["x"], eva_config={"rho": 2.0})
    assert len(load_adapter(str(adapter), stage).layers) == 4


# --- its tensors -----------------------------------------------------------------------------


def rewritten(adapter: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return adapter


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.lm_head.weight", "lm_head.weight, a whole tensor"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "the embedding model.embed_tok"),
        (f"{QUERY}.lora_A.default.weight", "no name that peft gives"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", "no name that peft gives"),
        (f"{QUERY}.lora_B.bias", "has a bias too many"),
        (f"{QUERY}.lora_magnitude_vector", "has a magnitude too many"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "lacks the second"),
    ],
)
def test_a_tensor_too_many_is_refused_by_name(key, words, adapter, stage):
    rewritten(adapter, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    assert words in refusal(adapter, stage)


def test_an_adapter_without_a_tensor_is_refused(adapter, stage):
    rewritten(adapter, lambda tensors: tensors.clear())
    assert "holds no tensor" in refusal(adapter, stage)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(value, adapter, stage):
    rewritten(adapter, lambda tensors: tensors[f"{QUERY}.lora_B.weight"].fill_(value))
    assert f"{QUERY}.lora_B.weight holds NaN or infinity" in refusal(adapter, stage)


def test_matrices_so_large_that_the_layers_overflow_are_refused(adapter, stage):
    rewritten(adapter, lambda tensors: [it.fill_(1e30) for it in tensors.values()])
    assert "NaN on random input" in refusal(adapter, stage)


def test_whole_numbers_are_refused(adapter, stage):
    key = f"{QUERY}.lora_A.weight"
    rewritten(adapter, lambda tensors: tensors.update({key: tensors[key].to(torch.int32)}))
    assert f"{key} is of torch.int32" in refusal(adapter, stage)


def test_a_truncated_file_is_refused(adapter, stage):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is truncated" in refusal(adapter, stage)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, struct.pack("<Q", 4) + b"{{{{"])
def test_a_file_that_is_no_safetensors_file_is_refused(header, adapter, stage):
    (adapter / "adapter_model.safetensors").write_bytes(header)
    assert "adapter_model.safetensors" in refusal(adapter, stage)


def test_a_header_that_announces_more_than_there_is_takes_no_memory(adapter, stage):
    """Rank 10^4 in a file without bytes for it."""
    shape, num_bytes = [10_000, 32], 10_000 * 32 * 4
    header = {}
    for at, (part, size) in enumerate((("lora_A", shape), ("lora_B", shape[::-1]))):
        offsets = [at * num_bytes, (at + 1) * num_bytes]
        name = f"{QUERY}.{part}.weight"
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": offsets}
    text = json.dumps(header).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    change_config(adapter, r=10_000)
    assert "is truncated" in refusal(adapter, stage)


# --- the model -------------------------------------------------------------------------------


def test_an_adapter_of_a_wider_model_is_refused_with_both_shapes(tmp_path, stage):
    wide = tiny_model("llama", hidden_size=64)
    adapted(wide, tmp_path, target_modules=["v_proj"])
    sentence = refusal(tmp_path, stage)
    assert "model.layers.0.self_attn.v_proj from 64 to 32 features" in sentence
    assert "the model's own goes from 32 to 16" in sentence


def test_an_adapter_of_another_architecture_is_refused_by_its_module(tmp_path, stage):
    adapted(tiny_model("gpt2"), tmp_path, target_modules=["c_attn"])
    sentence = refusal(tmp_path, stage)
    assert "transformer.h.0.attn.c_attn" in sentence and "has no such module" in sentence


def test_an_adapter_of_a_deeper_model_is_refused_also_by_a_stage_that_it_would_fit(tmp_path, stage):
    """Its first two layers are here and would do; the whole chain has to say no."""
    adapted(tiny_model("llama", num_hidden_layers=6), tmp_path, target_modules=["q_proj"])
    assert "model.layers.4.self_attn.q_proj" in refusal(tmp_path, stage)


def test_what_is_no_linear_layer_is_refused_with_what_it_is(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    stage = load_stage(str(tmp_path / "model"), sections=1, index=0, device="cpu")
    adapted(tiny_model("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    other = "base_model.model.model.layers.0.mlp.gate"
    rewritten(
        tmp_path / "adapter",
        lambda tensors: tensors.update(
            {
                f"{other}.lora_A.weight": torch.zeros(4, 32),
                f"{other}.lora_B.weight": torch.zeros(4, 4),
            }
        ),
    )
    assert "has a Qwen3MoeTopKRouter there, no linear layer" in refusal(tmp_path / "adapter", stage)


def test_what_the_manager_runs_before_the_first_layer_is_refused(tmp_path):
    model = save_tiny("opt_projected", tmp_path / "model")
    adapted(model, tmp_path / "adapter", target_modules=["project_in"])
    stage = load_stage(str(tmp_path / "model"), sections=1, index=0, device="cpu")
    assert "runs before the first layer" in refusal(tmp_path / "adapter", stage)


def test_an_adapter_that_takes_more_memory_than_there_is_is_refused(adapter, stage, monkeypatch):
    monkeypatch.setattr("engine.adapters.free_cpu_bytes", lambda: 100)
    assert "100 are free" in refusal(adapter, stage)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "idefics3"])
def test_an_adapter_of_a_whole_multimodal_model_fits_its_language_part(kind, tmp_path):
    model = shaken_multimodal(kind)
    model.save_pretrained(tmp_path / "model")
    language = r".*(language_model|text_model)\..*\.(q_proj|down_proj)|lm_head"
    theirs = adapted(model, tmp_path / "adapter", target_modules=language)
    served = tmp_path / "adapter"
    chain = split(tmp_path / "model", 2)
    prompt = list(range(3, 40))
    hidden = chain.entry.embed(prompt, range(len(prompt)))
    for stage, cache in zip(chain.stages, chain.caches, strict=True):
        loaded = load_adapter(str(served), stage)
        run = StageRun(
            start=0,
            num_tokens=len(prompt),
            rope_length=len(prompt),
            blocks=torch.arange(3),
            adapter=loaded,
        )
        hidden = stage.forward(torch.tensor(prompt), hidden, [run], cache)
    ours = chain.stages[-1].logits(hidden, [loaded] * len(prompt))
    assert float((ours - logits_of(theirs, prompt)).abs().max()) < 1e-4
    assert float((ours - logits_of(model, prompt)).abs().max()) > 0.1


def test_an_adapter_of_the_part_for_pictures_is_refused_by_its_module(tmp_path):
    model = shaken_multimodal("llava")
    model.save_pretrained(tmp_path / "model")
    adapted(model, tmp_path / "adapter", target_modules=["q_proj"])
    stage = load_stage(str(tmp_path / "model"), sections=1, index=0, device="cpu")
    sentence = refusal(tmp_path / "adapter", stage)
    assert "vision" in sentence and "has no such module" in sentence


def test_the_files_alone_tell_most_of_it_without_a_model(adapter):
    change_config(adapter, peft_type="VERA")
    with pytest.raises(AdapterError, match="VERA"):
        AdapterFiles(adapter)


# --- files that somebody made to do harm -----------------------------------------------------


def spoil_entry(adapter: Path, **said: Any) -> None:
    """Let the header say something else of the first tensor."""
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = min(it for it in header if it != "__metadata__")
    header[key] |= said
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "said",
    [
        *({"shape": it} for it in ([float("inf")], [2.0, 4], [10**300] * 3, [1] * 99, "x")),
        *({"data_offsets": it} for it in ([-8, 0], [8, 0], [0], None, [0, 10**30])),
        *({"dtype": it} for it in ("F4000", None, ["F32"])),
        {"shape": [0, 2**60], "data_offsets": [0, 0]},
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_refused(said, adapter, stage):
    spoil_entry(adapter, **said)
    assert "adapter_model.safetensors: tensor " in refusal(adapter, stage)


@pytest.mark.parametrize(
    "values",
    [
        *({"r": it} for it in (10**9, -1, 0, 1.5, float("nan"), "4", True, [4])),
        *({"lora_alpha": it} for it in (float("nan"), float("inf"), "8", [8], 10**400)),
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": ["x"]},
        {"rank_pattern": {"a" * 1000: 4}},
        {"alpha_pattern": {f"x{it}": 1 for it in range(5000)}},
        {"peft_type": ["LORA"]},
        {"task_type": {"a": 1}},
        {"auto_map": {"x": "evil.Evil"}},
        {"bias": ["all"]},
        {"init_lora_weights": ["x"]},
    ],
    ids=lambda it: str(it)[:50],
)
def test_a_config_that_makes_no_sense_is_refused_with_its_key(values, adapter, stage):
    change_config(adapter, **values)
    assert f"adapter_config.json: {next(iter(values))}" in refusal(adapter, stage)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(.*)*x", "(\\w|\\w\\w|[.])+y", "(.?){99}(.?){99}z"])
def test_a_pattern_that_tries_for_ever_is_refused_or_found_to_be_another(
    name, pattern, adapter, stage
):
    change_config(adapter, **{name: {pattern: 4}})
    begun_s = time.process_time()
    try:
        load_adapter(str(adapter), stage)
    except AdapterError as refused:
        assert "which takes for ever to compare with" in str(refused)  # noqa: PT017 - either way
    assert time.process_time() - begun_s < 20


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_is_not_followed(file, adapter, stage, tmp_path):
    (adapter / file).rename(tmp_path / "another's")
    (adapter / file).symlink_to(tmp_path / "another's")
    assert f"{adapter / file} is a link to {tmp_path / chr(97)}" in refusal(adapter, stage)
