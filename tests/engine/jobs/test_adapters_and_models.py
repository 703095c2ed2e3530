"""Loading a base model, saving and merging adapters: what does not fit is refused in a sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import Checkpoint
from engine.jobs.attention_check import check_packing
from engine.jobs.base_model import (
    Placement,
    choose_placement,
    load_base,
    load_tokenizer,
    read_sizes,
    reference,
)
from engine.jobs.lora_config import adapt, find_targets, lora_config
from engine.jobs.saving import (
    check_adapter,
    save_adapter,
    save_adapter_weights,
    save_merged,
    stored_dtype,
)
from engine.jobs.settings import LoraSettings, TrainingSettings
from proto.errors import Error, ModelError, UsageError
from tests.support.finetuning import save_model
from tests.support.hub import COMMIT, REPO, fill_cache
from tests.support.models import VOCAB, tiny_model

CPU = Placement(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An adapter that changes something."""
    adapted = adapt(load_base(Checkpoint(str(model)), CPU), LoraSettings(r=2), seed=1)
    with torch.no_grad():
        for name, it in adapted.named_parameters():
            if "lora_B" in name:
                it.normal_()
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    save_adapter(adapted, Checkpoint(str(model)), folder)
    return folder


def test_an_adapter_saved_from_its_tensors_is_the_same(model, adapter, tmp_path):
    checkpoint = Checkpoint(str(model))
    base = load_base(checkpoint, CPU)
    config = lora_config(LoraSettings(r=2), find_targets(base, ()))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_adapter_weights(weights, config, checkpoint, tmp_path / "again")
    save_merged(checkpoint, adapter, tmp_path / "one")
    save_merged(checkpoint, tmp_path / "again", tmp_path / "two")
    one, two = ((tmp_path / it / "model.safetensors").read_bytes() for it in ("one", "two"))
    assert one == two != (model / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["inference_mode"]


@pytest.mark.parametrize(
    ("kind", "overrides", "sentence"),
    [
        ("gpt2", {}, r"is for another model: it has weights for .*, and other has no such layer"),
        ("llama", {"hidden_size": 64}, r"is for another model: at .* it is 32 wide, .* other 64"),
        ("llama", {"num_hidden_layers": 2}, r"weights for model\.layers\.[23]\..*no such layer"),
    ],
)
def test_an_adapter_of_another_model_is_refused(kind, overrides, sentence, adapter, tmp_path):
    other = save_model(tmp_path / "other", kind, **overrides)
    with pytest.raises(UsageError, match=sentence):
        save_merged(Checkpoint(str(other)), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_no_lora_adapter_is_refused(adapter, tmp_path):
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        check_adapter(tmp_path)
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    with pytest.raises(UsageError, match="is of type 'IA3': LORA is what can be added"):
        check_adapter(folder)
    config.write_text("[")
    with pytest.raises(UsageError, match=r"adapter_config\.json cannot be read"):
        check_adapter(folder)
    shutil.copy(adapter / "adapter_config.json", config)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no adapter_model\.safetensors"):
        check_adapter(folder)


def test_a_damaged_or_diverged_adapter_is_refused(model, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {key: it.clone() for key, it in load_file(weights).items()}  # of a mapped file
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UsageError, match="is damaged"):
        save_merged(Checkpoint(str(model)), folder, tmp_path / "merged")
    first = next(iter(tensors))
    tensors[first][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(UsageError, match="infinite or no number"):
        save_merged(Checkpoint(str(model)), folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tensors = {key: it.clone() for key, it in load_file(folder / "model.safetensors").items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        load_base(Checkpoint(str(folder)), CPU)


def test_weights_that_do_not_fit_in_memory_are_refused_with_the_numbers(model, monkeypatch):
    monkeypatch.setattr("engine.jobs.base_model.free_cpu_bytes", lambda: 1000)
    with pytest.raises(Error, match=r"take .* GB in float32, and .* --dtype bfloat16 \(.* GB\)"):
        load_base(Checkpoint(str(model)), CPU)


def test_a_model_from_the_hub_cache_is_named_by_its_id(model, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    fill_cache(tmp_path, model)
    checkpoint = Checkpoint(REPO)
    assert reference(checkpoint) == REPO
    assert checkpoint.folder.name == COMMIT
    assert read_sizes(checkpoint).max_context == 512
    assert load_tokenizer(checkpoint) is not None


def test_a_model_without_tokenizer_has_none(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    assert load_tokenizer(Checkpoint(str(tmp_path))) is None


def test_8_bit_weights_are_not_merged_into(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tensors = {key: it.clone() for key, it in load_file(folder / "model.safetensors").items()}
    save_file({key: it.to(torch.float8_e4m3fn) for key, it in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    with pytest.raises(ModelError, match=r"is stored as float8_e4m3fn: .*--no-merge"):
        stored_dtype(Checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "tpu"}, "--device 'tpu' is none of auto, cpu, cuda"),
        ({"device": "meta"}, "--device 'meta' is none of auto, cpu, cuda"),
        ({"device": "cuda:7"}, r"--device cuda:7: torch .* sees \d GPUs here"),
        ({"device": "cpu", "quantize": "4bit"}, r"--quantize 4bit \(QLoRA\) needs a GPU"),
    ],
)
def test_a_device_that_is_not_there_is_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        choose_placement(TrainingSettings(**settings))


def test_a_cpu_computes_in_float32_unless_told():
    assert choose_placement(TrainingSettings(device="cpu")) == CPU
    told = choose_placement(TrainingSettings(device="cpu", dtype="bfloat16"))
    assert told.dtype_name == "bfloat16"


def test_packing_is_refused_where_a_model_does_not_keep_samples_apart():
    check_packing(tiny_model("mistral"), CPU, VOCAB)
    with pytest.raises(
        UsageError, match=r"--packing: OPTForCausalLM does not keep samples .* apart"
    ):
        check_packing(tiny_model("opt"), CPU, VOCAB)
