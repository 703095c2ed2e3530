"""`manager finetune data`: counts, lengths, what was dropped, what is learnt."""

from __future__ import annotations

import json

from tests.support.finetuning import write_jsonl
from tests.support.processes import ROOT

ROWS = [
    {"instruction": "Why?", "output": "So."},
    {"instruction": "Why not?", "output": ""},
    {"instruction": "the fox " * 300, "output": "yes"},
    {"instruction": "What?", "output": "the lazy dog " * 200},
]


def test_the_summary_says_what_is_learnt_and_what_was_dropped(call, tiny, tmp_path):
    path = write_jsonl(tmp_path / "qa.jsonl", ROWS)
    words = ("finetune", "data", "--base-model", tiny, "--train-path", path)
    answer = call(*words, "--show", 1)
    assert answer.code == 0, answer.err
    assert "evol-instruct" in answer.out and "chat template" in answer.out
    assert f"dropped 1: nothing in it ({path}:2)" in answer.out
    assert f"dropped 1: the prompt alone fills --max-length ({path}:3)" in answer.out
    assert "shortened 1 to --max-length 512 tokens" in answer.out
    assert "<|user|>Why?<|end|><|assistant|>[[So.<|end|>]]" in answer.out
    said = json.loads(call(*words, "--show", 2, "--json").out)
    assert said["train"]["samples"] == 2 and said["train"]["lengths"]["max"] == 512
    assert said["dropped"] == {"nothing in it": 1, "the prompt alone fills --max-length": 1}
    assert said["dropped_places"]["nothing in it"] == [f"{path}:2"]
    assert len(said["rows"]) == 2


def test_a_part_is_held_out_and_packed_rows_say_how_full_they_are(call, tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox\n" * 40)
    said = json.loads(
        call("finetune", "data", "--model", tiny, "--train-path", path, "--validation", "25%",
             "--packing", "--json").out
    )  # fmt: skip
    assert (said["train"]["samples"], said["validation"]["samples"]) == (30, 10)
    assert said["train"]["rows"] == 1 and 0 < said["train"]["fill"] <= 1


def test_the_shipped_examples_are_read_with_the_demo_model(call):
    folder = ROOT / "examples" / "finetune"
    words = ("finetune", "data", "--json", "--train-path")
    said = json.loads(
        call(*words, folder / "train.txt", "--val-path", folder / "validation.txt").out
    )
    assert said["train"]["samples"] == 208 and said["validation"]["samples"] == 32
    assert said["dropped"] == {}
    said = json.loads(call(*words, folder / "questions.jsonl").out)
    assert said["template"] == "plain" and said["train"]["samples"] == 48


def test_settings_may_stand_in_the_environment(call, tiny, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox\n" * 40)
    monkeypatch.setenv("COMBOIO_TRAIN_PATH", str(path))
    monkeypatch.setenv("COMBOIO_VALIDATION", "4")
    said = json.loads(call("finetune", "data", "--model", tiny, "--json").out)
    assert (said["train"]["samples"], said["validation"]["samples"]) == (36, 4)
    monkeypatch.setenv("COMBOIO_VALIDATION", "much")
    answer = call("finetune", "data", "--model", tiny)
    assert answer.code == 2 and "(from COMBOIO_VALIDATION)" in answer.err
