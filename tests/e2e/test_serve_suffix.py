"""`suffix`: a model whose tokenizer has the tokens for it writes what is between two texts."""

from __future__ import annotations

from pathlib import Path

import openai

from tests.support.chains import save_tiny_with_tokenizer
from tests.support.forked_workers import Nursery
from tests.support.serving import Server

MARKS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
PROMPT, SUFFIX = "the quick ", " the lazy dog"


def test_a_gap_is_filled_by_a_model_that_has_tokens_for_it(tmp_path: Path) -> None:
    tiny = save_tiny_with_tokenizer(tmp_path, vocab_size=310)
    tiny.tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tiny.tokenizer.save_pretrained(tmp_path)
    ids = tiny.tokenizer(f"{MARKS[0]}{PROMPT}{MARKS[1]}{SUFFIX}{MARKS[2]}")["input_ids"]
    assert ids[0] >= 300 and ids[-1] >= 300
    with Nursery() as nursery:
        worker = nursery.start("--model", str(tmp_path), "--kv-memory", "16MB")
        with (
            Server("--workers", worker.address) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            asked = {"model": server.model, "max_tokens": 9, "temperature": 0}
            plain = client.completions.create(prompt=ids, **asked)
            tokens = tiny.tokenizer(PROMPT)["input_ids"]
            for prompt in (PROMPT, tokens):
                filled = client.completions.create(prompt=prompt, suffix=SUFFIX, **asked)
                assert filled.choices[0].text == plain.choices[0].text
                assert filled.usage is not None and filled.usage.prompt_tokens == len(ids)
            both = client.completions.create(
                prompt=[PROMPT, PROMPT], suffix=SUFFIX, echo=True, n=2, **asked
            )
            assert [it.index for it in both.choices] == [0, 1, 2, 3]
            assert both.choices[2].text == PROMPT + plain.choices[0].text
            # Another token of the family ends the text, as the model's own end token does.
            ended = client.completions.create(
                prompt=PROMPT, suffix=SUFFIX, logit_bias={str(ids[0]): 100}, **asked
            )
            assert (ended.choices[0].text, ended.choices[0].finish_reason) == ("", "stop")
            body = {"prompt": PROMPT, "suffix": SUFFIX, "echo": True, "logprobs": 1}
            refused = server.post("/v1/completions", body)
            assert refused.status == 400 and "leave out suffix, or logprobs" in refused.error
