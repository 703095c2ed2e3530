"""LoRA runs end to end in this process, against plain PyTorch and peft, and against themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from engine.jobs.batches import BatchPlan
from engine.jobs.events import Stepped
from engine.jobs.stopping import Stopped, StopRequest
from proto.errors import Error, UsageError
from tests.support.finetuning import (
    EXCHANGES,
    Watching,
    job_settings,
    losses_of,
    metrics_of,
    resumed,
    run,
    save_model,
    validation_losses_of,
    write_jsonl,
)

# peft asks transformers for something under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

KINDS = ("llama", "phi3", "gpt2")
STEPS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", EXCHANGES)


@pytest.fixture(scope="module")
def undisturbed(models, data, tmp_path_factory):
    """A run with dropout that nothing happened to."""
    save_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = job_settings(
        models["llama"], data, save_dir, validation=data, lora={"dropout": 0.2}, max_steps=9,
        accumulation=2, save_steps=4, eval_steps=3, output={"merge": False},
    )  # fmt: skip
    run(settings)
    return settings


def plain_rows(model: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels, written down independently of the package."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for it in EXCHANGES:
        prompt = tokenizer(it["prompt"])["input_ids"]
        whole = tokenizer(it["prompt"] + it["completion"])["input_ids"]
        if whole[: len(prompt)] != prompt:
            whole = prompt + tokenizer(it["completion"])["input_ids"]
        ids = [*whole, tokenizer.eos_token_id]
        rows.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    return rows


def plain_training(model: Path, settings, steps: int):
    """A plain loop with transformers and peft: whole batches, no accumulation."""
    torch.manual_seed(settings.training.seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=base.config.model_type == "gpt2",
    )  # fmt: skip
    torch.manual_seed(settings.training.seed)
    adapted = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(
        [it for it in adapted.parameters() if it.requires_grad], lr=1e-2, weight_decay=0.0
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 1, steps)
    rows = plain_rows(model)
    plan = BatchPlan.of(settings.training, len(rows))
    losses = []
    adapted.train()
    for step in range(steps):
        some = [rows[at] for at in plan.rows_of(step)]
        width = max(len(ids) for ids, _ in some)
        ids = torch.tensor([it + [0] * (width - len(it)) for it, _ in some])
        labels = torch.tensor([it + [-100] * (width - len(it)) for _, it in some])
        mask = torch.tensor([[1] * len(it) + [0] * (width - len(it)) for it, _ in some])
        loss = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([it for it in adapted.parameters() if it.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapted.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_merged_logits_equal_a_plain_loop_with_peft(kind, models, data, tmp_path):
    model = models[kind]
    settings = job_settings(
        model, data, tmp_path / "run", lora={"dropout": 0.0}, batch_size=2, accumulation=2,
        max_steps=STEPS, warmup=1,
    )  # fmt: skip
    result = run(settings)
    losses, adapted = plain_training(model, settings, STEPS)
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.1
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(result.merged)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(model)
        assert (base(input_ids=ids).logits - expected).abs().max() > 1e-2
        loaded = PeftModel.from_pretrained(base, str(result.adapters))(input_ids=ids).logits
    torch.testing.assert_close(loaded, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


def test_a_stopped_run_goes_on_with_the_losses_of_an_undisturbed_one(undisturbed, tmp_path):
    stop = StopRequest()

    def stop_after_five(event):
        if isinstance(event, Stepped) and event.step == 5:
            stop.signal_number = 15

    settings = replace(undisturbed, output=replace(undisturbed.output, save_dir=str(tmp_path)))
    with pytest.raises(Stopped, match="stopped after step 5 of 9") as stopped:
        run(settings, Watching(stop_after_five), stop)
    assert stopped.value.signal_number == 15
    run(resumed(settings))
    expected = Path(undisturbed.output.save_dir)
    assert losses_of(tmp_path) == losses_of(expected)
    assert validation_losses_of(tmp_path) == validation_losses_of(expected)
    assert [it["step"] for it in metrics_of(tmp_path) if it["event"] == "train"] == list(
        range(1, 10)
    )
    assert trained(tmp_path) == trained(expected)


def test_a_run_killed_between_checkpoints_forgets_what_came_after_the_last(undisturbed, tmp_path):
    def die_after_six(event):
        if isinstance(event, Stepped) and event.step == 6:
            raise KeyboardInterrupt

    settings = replace(undisturbed, output=replace(undisturbed.output, save_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        run(settings, Watching(die_after_six))
    assert len(losses_of(tmp_path)) == 6
    watching = Watching()
    run(resumed(settings), watching)
    assert watching.events[0].step == 4  # the last checkpoint
    assert losses_of(tmp_path) == losses_of(Path(undisturbed.output.save_dir))
    assert trained(tmp_path) == trained(Path(undisturbed.output.save_dir))


def trained(save_dir: Path) -> bytes:
    return (save_dir / "lora_adapters" / "adapter_model.safetensors").read_bytes()


def test_the_division_into_micro_batches_does_not_change_the_losses(models, data, tmp_path):
    found = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        settings = job_settings(
            models["llama"], data, tmp_path / str(batch_size), validation=data,
            lora={"dropout": 0.0}, batch_size=batch_size, accumulation=accumulation,
            output={"merge": False},
        )  # fmt: skip
        run(settings)
        found.append(losses_of(tmp_path / str(batch_size)))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_losses_of_rows_of_their_own(kind, models, data, tmp_path):
    found = []
    for packing in (False, True):
        settings = job_settings(
            models[kind], data, tmp_path / str(packing), validation=data, max_steps=3,
            batch_size=16, lora={"dropout": 0.0}, data_changes={"packing": packing},
            output={"merge": False},
        )  # fmt: skip
        result = run(settings)
        found.append((losses_of(result.save_dir), validation_losses_of(result.save_dir)))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert [it for _, it in found[1][1]] == pytest.approx([it for _, it in found[0][1]], abs=1e-5)
    rows = next(it for it in metrics_of(tmp_path / "True") if it["event"] == "start")["rows"]
    assert rows < len(EXCHANGES)


def test_gradient_checkpointing_computes_the_same(undisturbed, tmp_path):
    settings = replace(
        undisturbed,
        output=replace(undisturbed.output, save_dir=str(tmp_path)),
        training=replace(undisturbed.training, gradient_checkpointing=True),
    )
    run(settings)
    assert losses_of(tmp_path) == pytest.approx(
        losses_of(Path(undisturbed.output.save_dir)), abs=1e-6
    )


@pytest.mark.parametrize("variant", [{"rslora": True}, {"dora": True}])
def test_variants_of_lora_are_saved_and_merged(variant, models, data, tmp_path):
    result = run(job_settings(models["phi3"], data, tmp_path / "run", lora=variant, max_steps=3))
    config = json.loads((result.adapters / "adapter_config.json").read_text())
    assert config["use_rslora"] is variant.get("rslora", False)
    assert config["use_dora"] is variant.get("dora", False)
    base = AutoModelForCausalLM.from_pretrained(models["phi3"])
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, str(result.adapters))(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(result.merged)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)


def test_results_hold_tokenizer_and_chat_template_and_name_the_base_absolutely(
    data, tmp_path, monkeypatch
):
    save_model(tmp_path / "model", chat=True)
    monkeypatch.chdir(tmp_path)
    settings = job_settings(Path("model"), data, Path("run"), max_steps=1)
    result = run(settings)
    config = json.loads((result.adapters / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "model").resolve())
    for folder in (result.adapters, result.merged):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o044, f"{path} cannot be read by others"


def test_a_half_precision_base_is_merged_in_its_own_dtype(data, tmp_path):
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    result = run(job_settings(model, data, tmp_path / "run", max_steps=2))
    merged = AutoModelForCausalLM.from_pretrained(result.merged)
    assert merged.dtype is torch.bfloat16
    path = "model.layers.2.mlp.up_proj"
    base = AutoModelForCausalLM.from_pretrained(model).get_submodule(path).weight
    adapter = load_file(result.adapters / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
    assert a.dtype is torch.float32
    expected = (base.float() + 8 / 4 * (b @ a)).to(torch.bfloat16)  # rounded once
    assert not torch.equal(expected, base)
    torch.testing.assert_close(merged.get_submodule(path).weight, expected, atol=0, rtol=0)


def test_a_finished_run_is_left_alone_and_merged_later_if_asked(models, data, tmp_path):
    settings = job_settings(
        models["llama"], data, tmp_path / "run", max_steps=2, output={"merge": False}
    )
    first = run(settings)
    assert first.merged is None
    before = trained(tmp_path / "run")
    again = resumed(settings)
    second = run(replace(again, output=replace(again.output, merge=True)))
    assert second.merged is not None and (second.merged / "config.json").is_file()
    assert trained(tmp_path / "run") == before
    assert len(losses_of(tmp_path / "run")) == 2


def test_resuming_with_other_settings_or_data_is_refused(models, data, tmp_path):
    settings = job_settings(
        models["llama"], data, tmp_path / "run", max_steps=2, output={"merge": False}
    )
    run(settings)
    with pytest.raises(UsageError, match=r"learning_rate was 0\.01 and is 0\.02"):
        run(resumed(settings, learning_rate=2e-2))
    other = write_jsonl(tmp_path / "other.jsonl", EXCHANGES[:4])
    changed = replace(settings.data, train=(str(other),))
    with pytest.raises(UsageError, match="the training data is not the same"):
        run(replace(resumed(settings), data=changed))
    # In other parts, the same steps.
    run(resumed(settings, batch_size=1, accumulation=2))


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_turn(models, data, tmp_path):
    settings = job_settings(
        models["llama"], data, tmp_path / "run", max_grad_norm=0.0, learning_rate=1e30, warmup=0,
        save_steps=1,
    )  # fmt: skip
    with pytest.raises(Error, match=r"the loss became .* a lower --learning-rate .*step-0000000"):
        run(settings)


def test_the_files_of_a_run_say_what_it_did(models, data, tmp_path):
    settings = job_settings(
        models["gpt2"], data, tmp_path / "run", validation=data, epochs=2, max_steps=None,
        log_steps=2, output={"merge": False, "tensorboard": True},
    )  # fmt: skip
    result = run(settings)
    events = metrics_of(result.save_dir)
    kinds = [it["event"] for it in events]
    assert kinds[0] == "start" and kinds[-1] == "end"
    assert kinds.count("train") == 8 and kinds.count("epoch") == 2
    assert [it["step"] for it in events if it["event"] == "validation"] == [0, 4, 8]
    step = next(it for it in events if it["event"] == "train")
    assert step["tokens"] > 0 and step["tokens_per_s"] > 0 and step["samples_per_s"] > 0
    assert step["memory"]["rss_bytes"] > 0 and step["learning_rate"] == 0.0
    log = (result.save_dir / "train.log").read_text()
    assert "[memory] step 2: CPU " in log and "validation after step 8" in log
    assert (result.save_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = result.report.read_text()
    assert "validation loss" in report and "c_attn x 4, c_proj x 8, c_fc x 4" in report
    assert list((result.save_dir / "tensorboard").iterdir())
    assert scalars(result.save_dir / "tensorboard", "train/loss") == pytest.approx(
        losses_of(result.save_dir)
    )
    assert sorted(it.name for it in (result.save_dir / "checkpoints").iterdir()) == [
        "step-00000008"
    ]
    run_file = json.loads((result.save_dir / "run.json").read_text())
    assert run_file["state"] == "finished"
    assert result.figures["last_validation_loss"] < result.figures["first_validation_loss"]


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [it.value for it in accumulator.Scalars(tag)]
