"""The tests' own model: llama.cpp and transformers write the same text with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.llama_run import llama_run
from tests.support.tiny_gguf import write_tiny_checkpoint, write_tiny_gguf

PROMPT = "the fox and a dog, olá 日本"
NUM_TOKENS = 40


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first, second, other = (
        write_tiny_gguf(tmp_path / f"{index}.gguf", seed=seed).read_bytes()
        for index, seed in enumerate((3, 3, 4))
    )
    assert first == second != other


@pytest.mark.llama_cpp
def test_greedy_text_is_that_of_transformers_with_and_without_its_chat_template(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=1)
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", seed=1)
    words = ("--model", str(path), "--prompt", PROMPT, "--json")
    for more, chat in ((("--no-chat",), False), (("--system", "be brief"), True)):
        done = llama_run(*words, *more, "--max-new-tokens", str(NUM_TOKENS))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"] == transformers_text(folder, chat=chat)


def transformers_text(folder: Path, *, chat: bool) -> str:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    if chat:
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    out = model.generate(torch.tensor([ids]), max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(out[0][len(ids) :])
