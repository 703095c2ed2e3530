"""`manager finetune merge`: an adapter and its base model become one checkpoint."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny, exchanges):
    from tests.support.finetuning import job_settings, run

    folder = tmp_path_factory.mktemp("run") / "run"
    run(job_settings(tiny, exchanges, folder, max_steps=2))
    return folder


def test_the_merged_model_is_the_one_that_the_run_makes(call, run_dir, tmp_path):
    words = ("finetune", "merge", "--adapter", run_dir / "lora_adapters", "--output",
             tmp_path / "merged")  # fmt: skip
    answer = call(*words)
    assert (answer.code, answer.out) == (0, f"merged_model {tmp_path}/merged\n")
    made, expected = (
        {it.name: it.read_bytes() for it in folder.iterdir()}
        for folder in (tmp_path / "merged", run_dir / "merged_model")
    )
    assert made == expected
    assert call(*words).err.startswith(
        f"manager: --output {tmp_path}/merged is not empty: pass --ov"
    )
    assert call(*words, "--overwrite").code == 0


def test_nothing_but_a_checkpoint_is_overwritten(call, run_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    answer = call("finetune", "merge", "--adapter", run_dir / "lora_adapters", "--output", tmp_path,
                  "--overwrite")  # fmt: skip
    assert answer.code == 2 and "holds none (no config.json)" in answer.err
    assert (tmp_path / "thesis.tex").exists()


def test_an_adapter_without_its_base_model_says_which_is_missing(call, run_dir, tmp_path):
    answer = call("finetune", "merge", "--adapter", tmp_path, "--output", tmp_path / "merged")
    assert answer.code == 2 and "holds no adapter_config.json" in answer.err
    answer = call("finetune", "merge", "--adapter", run_dir / "lora_adapters", "--base-model",
                  tmp_path / "gone", "--output", tmp_path / "merged")  # fmt: skip
    assert (
        answer.code == 2 and f"--base-model {tmp_path}/gone: there is no such folder" in answer.err
    )


def test_a_base_model_is_not_merged_into_itself(call, run_dir, tiny):
    answer = call("finetune", "merge", "--adapter", run_dir / "lora_adapters", "--output", tiny,
                  "--overwrite")  # fmt: skip
    assert answer.code == 2 and "is the folder of the base model: name another one" in answer.err


def test_an_adapter_of_stacked_experts_is_merged_as_peft_does_and_fits_its_own_model(
    call, tmp_path
):
    from transformers import AutoModelForCausalLM

    from tests.support.adapters import adapted
    from tests.support.models import save_tiny

    save_tiny("mixtral", tmp_path / "base")
    save_tiny("mixtral", tmp_path / "other", intermediate_size=56)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(
        base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=experts
    )
    words = ("finetune", "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / "made",
             "--base-model", tmp_path / "base")  # fmt: skip
    assert call(*words).code == 0
    ids = torch.arange(8)[None]
    with torch.no_grad():
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")(ids).logits
        torch.testing.assert_close(made, model(ids).logits, rtol=1e-3, atol=1e-3)
    answer = call(*words[:-1], tmp_path / "other", "--overwrite")
    assert answer.code == 2 and "is for another model: at model.layers.0.mlp.experts" in answer.err
