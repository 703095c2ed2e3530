"""Which layers get adapters, for every kind of model."""

from __future__ import annotations

import pytest

from engine.jobs.lora_config import adapt, count_weights, find_targets
from engine.jobs.settings import LoraSettings
from proto.errors import UsageError
from tests.support.models import KINDS, tiny_model

LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What each kind's decoder multiplies with; written down by hand.
LAYERS = {
    "llama": set(LLAMA_NAMES),
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "opt_projected": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "starcoder2": {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen2_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_all_linear_layers_of_the_decoder_are_adapted(kind):
    model = tiny_model(kind)
    targets = find_targets(model, ())
    assert set(targets.counts) == LAYERS[kind]
    assert all(".layers." in path or ".h." in path for path in targets.paths)
    adapted = adapt(model, LoraSettings(r=2), seed=0)
    found = {name for name, it in adapted.named_modules() if hasattr(it, "lora_A")}
    assert found == {f"base_model.model.{path}" for path in targets.paths}
    trainable, total = count_weights(adapted)
    assert 0 < trainable < total / 2


def test_stacked_experts_are_said_to_stay_as_they_are():
    targets = find_targets(tiny_model("mixtral"), ())
    assert targets.untouched == (
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "mlp.gate.weight",
    )


@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode"])
def test_weights_that_lie_transposed_are_known(kind):
    assert find_targets(tiny_model(kind), ()).is_transposed is (kind == "gpt2")


def test_the_names_of_another_architecture_are_refused_with_those_there_are():
    with pytest.raises(
        UsageError,
        match=r"q_proj, k_proj, v_proj, gate_proj, up_proj fit no linear layer in the decoder of "
        r"Phi3ForCausalLM \(2 other names do\); it has down_proj, gate_up_proj, o_proj, qkv_proj",
    ):
        find_targets(tiny_model("phi3"), LLAMA_NAMES)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "q_pro", "input_layernorm"])
def test_what_is_no_linear_layer_of_the_decoder_is_refused(name):
    with pytest.raises(UsageError, match=f"--target-modules: {name} fits no linear layer"):
        find_targets(tiny_model("llama"), ("q_proj", name))


def test_named_layers_alone_are_adapted():
    model = tiny_model("llama")
    wanted = ("v_proj", "layers.2.self_attn.q_proj")
    targets = find_targets(model, wanted)
    assert targets.counts == {"q_proj": 1, "v_proj": 4}
    adapted = adapt(model, LoraSettings(r=2, target_modules=wanted), seed=0)
    found = {name for name, it in adapted.named_modules() if hasattr(it, "lora_A")}
    assert len(found) == 5
    everything = find_targets(tiny_model("llama"), ("all-linear",))
    assert set(everything.counts) == set(LLAMA_NAMES)


def test_every_kind_of_model_that_the_pipeline_runs_can_be_adapted():
    for kind in KINDS:
        assert find_targets(tiny_model(kind, num_hidden_layers=4), ()).paths, kind
