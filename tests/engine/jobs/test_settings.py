"""A job's settings travel as JSON, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.jobs.settings import (
    JobSettings,
    LoraSettings,
    OutputSettings,
    TrainingSettings,
    what_counts,
)
from proto.errors import UsageError
from tests.support.finetuning import job_settings


def test_settings_come_back_from_json_as_they_were():
    settings = job_settings(
        Path("m"), Path("d"), Path("s"), lora={"target_modules": ("a", "b")}, max_steps=3
    )
    assert JobSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_of_another_release_are_refused():
    said = job_settings(Path("m"), Path("d"), Path("s")).to_json()
    for change in ({"lora": {"rank": 3}}, {"method": None, "data": {}}):
        broken = {**said, **change}
        if "rank" not in str(change):
            del broken["method"]
        with pytest.raises(UsageError, match="written by another release"):
            JobSettings.from_json(broken)


def test_what_only_watches_a_run_may_change_when_it_goes_on():
    def counted(**training):
        return what_counts(job_settings(Path("m"), Path("d"), Path("s"), **training))

    assert counted(log_steps=1, save_steps=7, eval_steps=2) == counted()
    assert counted(learning_rate=1.0) != counted()


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (LoraSettings, {"r": 0}, "--lora-r 0 must be 1 or more"),
        (LoraSettings, {"alpha": 0}, "--lora-alpha 0 must be above 0"),
        (LoraSettings, {"dropout": 1.0}, "--lora-dropout 1 must be from 0"),
        (TrainingSettings, {"epochs": 0}, "--epochs 0 must be above 0"),
        (TrainingSettings, {"max_steps": 0}, "--max-steps 0 must be 1 or more"),
        (TrainingSettings, {"batch_size": 0}, "--per-device-train-batch-size 0"),
        (TrainingSettings, {"learning_rate": -1}, "--learning-rate -1 must be above 0"),
        (TrainingSettings, {"weight_decay": -1}, "--weight-decay -1 must not be below 0"),
        (TrainingSettings, {"seed": -1}, "--seed -1"),
        (TrainingSettings, {"schedule": "step"}, "--lr-schedule 'step' is none of linear"),
        (OutputSettings, {"save_dir": "x", "resume": True, "overwrite": True}, "pass one of them"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_option(kind, values, sentence):
    with pytest.raises(UsageError, match=sentence):
        kind(**values)
