"""What is refused before any process meets another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.jobs import axonn_library
from engine.jobs.axonn import check_settings
from engine.jobs.settings import JobSettings, LoraSettings, OutputSettings, TrainingSettings
from proto.errors import UsageError

SETTINGS = JobSettings(method="axonn", output=OutputSettings(save_dir="run"))


def test_weight_decomposition_is_refused_as_it_needs_whole_weights():
    with pytest.raises(UsageError, match="--dora needs whole base weights on each rank"):
        check_settings(replace(SETTINGS, lora=LoraSettings(dora=True)))


def test_quantized_weights_are_refused():
    with pytest.raises(UsageError, match="--quantize 4bit: AxoNN shards no quantized weights"):
        check_settings(replace(SETTINGS, training=TrainingSettings(quantize="4bit")))


def test_another_release_of_axonn_is_refused(monkeypatch):
    monkeypatch.setattr(axonn_library, "version", lambda _: "0.3.0")
    with pytest.raises(UsageError, match=r"axonn 0\.3\.0 is installed, .* made for 0\.2\.0"):
        axonn_library.check_version()


def test_the_release_that_is_installed_is_the_tested_one():
    pytest.importorskip("peft")
    axonn_library.check_version()
