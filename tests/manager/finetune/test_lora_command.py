"""`manager finetune lora`: options of both kinds of names, results, and bad input in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.finetuning import losses_of, metrics_of, save_model, write_jsonl
from tests.support.processes import ROOT, clean_environment

QUICK = ("--max-steps", 2, "--no-tensorboard", "--no-cuda")


def test_the_names_of_the_cluster_guides_work(call, tiny, exchanges, tmp_path):
    answer = call(
        "finetune", "lora", "--model_name", tiny, "--train_path", exchanges,
        "--val_path", exchanges, "--save_dir", tmp_path / "run", "--epochs", 2, "--lr", "1e-3",
        "--lora_r", 4, "--lora_alpha", 8, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--log_file", tmp_path / "my.log", "--no_cuda",
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert said["steps"] == 4 and said["lora_adapters"] == str(tmp_path / "run" / "lora_adapters")
    assert said["last_validation_loss"] < said["first_validation_loss"]
    run = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert run["lora"] | {"r": 4, "alpha": 8} == run["lora"]
    assert run["training"]["learning_rate"] == 1e-3 and run["training"]["accumulation"] == 2
    assert "[memory] step 4: CPU" in (tmp_path / "my.log").read_text()
    assert "step 4/4, epoch 2.00: loss" in answer.err
    assert "[memory] step 4: CPU" in answer.err


def test_batch_size_and_base_model_are_names_too(call, tiny, exchanges, tmp_path):
    answer = call(
        "finetune", "lora", "--base_model", tiny, "--train_path", exchanges, "--batch_size", 3,
        "--learning_rate", "1e-3", "--save-dir", tmp_path / "run", "--no-merge", *QUICK,
        "--target-modules", "q_proj,v_proj",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.out.splitlines() == [
        f"lora_adapters {tmp_path}/run/lora_adapters",
        f"report {tmp_path}/run/report.md",
    ]
    assert "adapting q_proj x 4, v_proj x 4" in answer.err
    assert metrics_of(tmp_path / "run")[0]["step_rows"] == 3
    assert not (tmp_path / "run" / "merged_model").exists()


def test_a_run_is_resumed_by_the_same_command(call, tiny, exchanges, tmp_path):
    words = ("finetune", "lora", "--model", tiny, "--train-path", exchanges, "--save-dir",
             tmp_path / "run", "--no-merge", "--resume", *QUICK)  # fmt: skip
    assert call(*words).code == 0
    answer = call(*words)
    assert answer.code == 0 and "nothing is left to train" in answer.err
    answer = call(*words[: -len(QUICK) - 1], *QUICK)  # without --resume
    assert answer.code == 2
    assert answer.err == (
        f"manager: --save-dir {tmp_path}/run is not empty: pass --resume to go on with the run in "
        "it, --overwrite to begin anew, or name another folder.\n"
    )
    assert call(*words[: -len(QUICK) - 1], "--overwrite", *QUICK).code == 0
    assert len(losses_of(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--train-path", "gone.jsonl"), "--train-path gone.jsonl: there is no such file"),
        (("--train-path", "nobody/nothing"), "no such data set was found in the caches"),
        (("--base-model", "/gone"), "--base-model /gone: there is no such folder"),
        (("--base-model", "nobody/nothing"), "found in the hub cache (HF_HUB_OFFLINE is set)"),
        (("--validation", "1.5"), "'1.5' is neither a share"),
        (("--validation", "120%"), "'120%' is neither a share"),
        (("--lora-r", "0"), "--lora-r 0 must be 1 or more"),
        (("--target-modules", "c_attn"), "c_attn fits no linear layer in the decoder of Llama"),
        (("--device", "cuda:9"), "sees "),
        (("--max-length", "100000"), "tiny takes 512 tokens at most"),
        (("--max-length", "2"), "no sample to train on (7 with the prompt alone fills"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(
    words, sentence, call, tiny, exchanges, tmp_path
):
    usual = {"--base-model": tiny, "--train-path": exchanges, "--save-dir": tmp_path / "run"}
    usual.update({words[0]: words[1]})
    answer = call("finetune", "lora", *[it for pair in usual.items() for it in pair])
    assert (answer.code, answer.out) == (2, "")
    last = answer.err.splitlines()[-1]
    assert last.startswith("manager: ") and sentence in last
    assert "Traceback" not in answer.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_malformed_data_is_said_with_its_line(call, tiny, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut off\n')
    answer = call("finetune", "lora", "--base-model", tiny, "--train-path", path, "--save-dir",
                  tmp_path / "run")  # fmt: skip
    assert answer.code == 2
    assert f"manager: {path}:2: not JSON (" in answer.err
    assert not (tmp_path / "run").exists()


def test_tokenized_data_trains_a_model_without_tokenizer(call, tmp_path):
    model = save_model(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    data = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7, 8]}] * 4)
    answer = call("finetune", "lora", "--model", model, "--train-path", data, "--save-dir",
                  tmp_path / "run", "--lr", "1e-2", *QUICK)  # fmt: skip
    assert answer.code == 0, answer.err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged_model")
    assert merged.dtype is torch.float32


def without(package, *words):
    """`manager WORDS` where a package is not installed."""
    script = (
        f"import sys\nsys.modules[{package!r}] = None\n"
        "from manager.cli import main\nmain(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=clean_environment(), check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("lora", "--train-path", "x", "--save-dir", "y"),
        ("merge", "--adapter", "x", "--output", "/tmp/never-made"),
    ],
)
def test_without_peft_the_extra_is_named(words):
    answer = without("peft", "finetune", *words)
    assert answer.returncode == 2
    assert answer.stderr == (
        f"manager: manager finetune {words[0]} needs peft, which is not installed: "
        "pip install 'comboio[finetune]'.\n"
    )


@pytest.mark.parametrize("words", [(), ("lora",), ("sft",), ("data",), ("merge",)])
def test_help_answers_without_torch(words):
    script = (
        "import sys\nfrom manager.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    print(*sorted(sys.modules), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, "finetune", *words, "--help"],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env=clean_environment(), check=False,
    )  # fmt: skip
    assert answer.returncode == 0 and "Usage: manager finetune" in answer.stdout
    loaded = {name.partition(".")[0] for name in answer.stderr.split()}
    assert loaded.isdisjoint({"torch", "transformers", "peft", "numpy", "datasets", "rich"})
