"""SFT in one process: trl's trainer learns what the loop learns, goes on, stops and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine.jobs.events import Stepped
from engine.jobs.sft import run_sft
from engine.jobs.sft_job import SftJob
from engine.jobs.sft_trainer import RowsTrainer
from engine.jobs.stopping import Stopped, StopRequest
from proto.errors import Error, ModelError, UsageError
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


def run_trl(settings, watching=None, stop=None, num_processes=1):
    job = SftJob(
        settings=replace(settings, method="sft"), num_processes=num_processes, on_cpu=True,
        mixed_precision="no", timeout_s=60,
    )  # fmt: skip
    return run_sft(job, watching or Watching(), stop or StopRequest())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "exchanges.jsonl", EXCHANGES)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


VARIANTS = {
    "plain": ("llama", {}, {}, {}),
    "dropout": ("llama", {}, {"dropout": 0.3}, {}),
    "accumulation": ("llama", {"batch_size": 1, "accumulation": 3}, {}, {}),
    "packing": ("llama", {}, {}, {"packing": True, "max_length": 96}),
    "checkpointing": ("llama", {"gradient_checkpointing": True}, {}, {}),
    "no_clipping": ("llama", {"max_grad_norm": 0.0, "schedule": "cosine"}, {}, {}),
    "gpt2": ("gpt2", {}, {}, {}),
    "phi3": ("phi3", {}, {"dora": True}, {}),
    "gemma2": ("gemma2", {}, {}, {}),
    "granite": ("granite", {}, {}, {}),
    "cohere": ("cohere", {}, {}, {}),
    "mixtral": ("mixtral", {}, {}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_trl_learns_what_the_loop_learns(name, data, tmp_path):
    kind, training, lora, rows = VARIANTS[name]
    model = save_model(tmp_path / "model", kind)
    settings = [
        job_settings(
            model, data, tmp_path / way, validation=data, lora={"dropout": 0.0, **lora},
            data_changes=rows, output={"merge": False}, **training,
        )
        for way in ("loop", "trl")
    ]  # fmt: skip
    run(settings[0])
    run_trl(settings[1])
    loop, trl = tmp_path / "loop", tmp_path / "trl"
    assert losses_of(trl) == pytest.approx(losses_of(loop), rel=2e-5)
    assert dict(validation_losses_of(trl)) == pytest.approx(
        dict(validation_losses_of(loop)), abs=1e-4
    )
    same = ("event", "step", "learning_rate", "tokens", "samples", "epoch", "total_steps")
    told = [[{key: it.get(key) for key in same} for it in metrics_of(way)] for way in (loop, trl)]
    assert told[0] == told[1]
    norms = [
        [it["grad_norm"] or 0.0 for it in metrics_of(way) if it["event"] == Stepped.kind]
        for way in (loop, trl)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_run_that_was_stopped_goes_on_with_the_losses_of_an_undisturbed_one(
    model, data, tmp_path
):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    settings = [
        job_settings(
            model, data, it, validation=data, max_steps=9, lora={"dropout": 0.2}, accumulation=3,
            batch_size=1,
        )
        for it in (calm, rough)
    ]  # fmt: skip
    run_trl(settings[0])
    stop = StopRequest()

    def ask(event):
        if isinstance(event, Stepped) and event.step == 4:
            stop.signal_number = 15

    with pytest.raises(Stopped, match=r"stopped after step 5 of 9: .*step-00000005 is whole"):
        run_trl(settings[1], Watching(ask), stop)
    result = run_trl(resumed(settings[1]))
    assert losses_of(rough) == losses_of(calm)
    assert validation_losses_of(rough) == validation_losses_of(calm)
    name = "lora_adapters/adapter_model.safetensors"
    assert (rough / name).read_bytes() == (calm / name).read_bytes()
    assert (rough / "merged_model" / "model.safetensors").is_file()
    assert result.to_json()["steps"] == 9
    watching = Watching()
    assert run_trl(resumed(settings[1]), watching).figures["steps"] == 9
    assert any("nothing is left to train" in line for line in watching.lines)


def test_a_checkpoint_of_the_last_step_needs_no_further_step(model, data, tmp_path):
    settings = job_settings(model, data, tmp_path / "run", max_steps=3, output={"merge": False})
    run_trl(settings)
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "state": "running"}))
    run_trl(resumed(settings))
    assert len(losses_of(tmp_path / "run")) == 3


def test_fewer_processes_than_asked_for_are_refused(model, data, tmp_path):
    settings = job_settings(model, data, tmp_path / "run")
    with pytest.raises(Error, match="1 of 2 processes train together here"):
        run_trl(settings, num_processes=2)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer_is_refused(model, tmp_path):
    rows = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [5, 6, 7]}])
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(UsageError, match="bare has no tokenizer, and trl wants one"):
        run_trl(job_settings(bare, rows, tmp_path / "run"))


def test_another_loss_than_the_models_own_is_refused(model, data, tmp_path, monkeypatch):
    trls = RowsTrainer.compute_loss
    monkeypatch.setattr(RowsTrainer, "compute_loss", lambda *a, **k: trls(*a, **k) * 1.01)
    with pytest.raises(ModelError, match="trl computes another loss of tiny than the model itself"):
        run_trl(job_settings(model, data, tmp_path / "run"))


def test_a_loss_that_is_no_number_ends_the_run(model, data, tmp_path):
    settings = job_settings(
        model, data, tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, warmup=0.0
    )
    with pytest.raises(Error, match=r"the loss became \S+ at step \d: begin anew with a lower"):
        run_trl(settings)
