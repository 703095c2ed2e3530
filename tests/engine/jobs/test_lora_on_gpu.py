"""LoRA on a GPU: half precision, its memory in the metrics, resumed, merged in the base's dtype."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.jobs.events import Stepped
from engine.jobs.stopping import Stopped, StopRequest
from proto.errors import UsageError
from tests.support.finetuning import (
    EXCHANGES,
    Watching,
    job_settings,
    losses_of,
    metrics_of,
    resumed,
    run,
    save_model,
    write_jsonl,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
def test_a_run_on_a_gpu_learns_goes_on_and_is_merged(dtype, tmp_path):
    model = save_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "train.jsonl", EXCHANGES)
    settings = job_settings(
        model, data, tmp_path / "run", device="cuda", dtype=dtype, max_steps=20, batch_size=8
    )
    stop = StopRequest()

    def stop_after_ten(event):
        if isinstance(event, Stepped) and event.step == 10:
            stop.signal_number = 15

    with pytest.raises(Stopped):
        run(settings, Watching(stop_after_ten), stop)
    result = run(resumed(settings))
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    memory = next(it["memory"] for it in metrics_of(tmp_path / "run") if it["event"] == "train")
    assert 0 < memory["gpu_bytes"] <= memory["peak_gpu_bytes"] <= memory["gpu_reserved_bytes"]
    assert AutoModelForCausalLM.from_pretrained(result.merged).dtype is torch.float32


def test_four_bits_train_where_bitsandbytes_is_and_are_refused_where_not(tmp_path):
    model = save_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    data = write_jsonl(tmp_path / "train.jsonl", EXCHANGES)
    settings = job_settings(
        model, data, tmp_path / "run", device="cuda", quantize="4bit", max_steps=20, batch_size=8
    )
    if find_spec("bitsandbytes") is None:
        with pytest.raises(UsageError, match="needs bitsandbytes, which is not installed"):
            run(settings)
        return
    run(settings)
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < losses[0] - 0.5
