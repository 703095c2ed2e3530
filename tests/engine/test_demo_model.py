"""The demo model keeps what its card says, and the script that makes it still runs."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import text
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "engine" / "demo"
SCRIPT = ROOT / "examples" / "train_demo_model.py"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load_model(DEMO)


@pytest.fixture(scope="module")
def untrained() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = load_model(DEMO).config
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


@pytest.fixture(scope="module")
def heldout() -> str:
    return (DEMO / "heldout.txt").read_text(encoding="utf-8")


def test_it_is_a_llama_of_six_layers_or_more_in_bfloat16(model: LlamaForCausalLM) -> None:
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers >= 6
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_its_files_are_small_and_hold_bfloat16_only() -> None:
    weights = DEMO / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert (DEMO / "heldout.txt").stat().st_size <= 200_000
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_its_files_name_no_place_on_the_machine_that_made_it() -> None:
    for path in DEMO.iterdir():
        if path.suffix in {".json", ".md"}:
            content = path.read_text(encoding="utf-8")
            assert str(ROOT) not in content, path.name
            assert str(Path.home()) not in content, path.name


@settings(deadline=None)
@given(text())
def test_any_text_survives_the_tokenizer(sample: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    assert tokenizer.decode(tokenizer.encode(sample)) == sample


def test_the_tokenizer_fits_the_model(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, heldout: str
) -> None:
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode(heldout, verbose=False)) == heldout


def test_it_predicts_heldout_text_as_well_as_its_card_says(
    model: LlamaForCausalLM,
    untrained: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    heldout: str,
) -> None:
    figures = json.loads((DEMO / "training.json").read_text())
    stated = figures["trained"]["perplexity"]
    assert f"{stated:.2f}" in (DEMO / "MODEL_CARD.md").read_text()

    token_ids = tokenizer.encode(heldout, verbose=False)
    window = figures["eval_window_tokens"]
    trained = perplexity(model, token_ids, window)
    assert trained < 1.02 * stated  # another CPU rounds bfloat16 elsewhere
    assert trained < perplexity(untrained, token_ids[: 2 * window], window) / 20


def test_it_writes_words_and_an_untrained_one_does_not(
    model: LlamaForCausalLM,
    untrained: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    heldout: str,
) -> None:
    known = set(words(heldout))
    assert share_known(written_by(model, tokenizer), known) > 0.7
    assert share_known(written_by(untrained, tokenizer), known) < 0.5


def test_its_greedy_text_starts_like_a_docstring(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, heldout: str
) -> None:
    prompt = tokenizer("Return the", return_tensors="pt")
    output = model.generate(
        **prompt, max_new_tokens=12, do_sample=False, temperature=1.0, top_p=1.0
    )
    continuation = tokenizer.decode(output[0, prompt.input_ids.shape[1] :])
    assert share_known(continuation, set(words(heldout))) > 0.7


def test_the_script_trains_a_loadable_model_in_a_few_steps(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    budget = ["--steps", "5", "--max-documents", "40", "--threads", "1"]
    subprocess.run(
        [sys.executable, str(SCRIPT), *budget, "--output", str(output)],
        check=True,
        timeout=240,  # about 15 s on a quiet core
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""},
        cwd=tmp_path,
        capture_output=True,
    )
    assert {path.name for path in output.iterdir()} == {path.name for path in DEMO.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    figures = json.loads((output / "training.json").read_text())
    assert figures["training"]["steps"] == 5
    assert figures["trained"]["perplexity"] < figures["untrained"]["perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(output, local_files_only=True)
    logits = load_model(output)(**tokenizer("Return the", return_tensors="pt")).logits
    assert logits.isfinite().all()


def load_model(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto").eval()


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, token_ids: list[int], window_tokens: int) -> float:
    """As the card defines it: windows side by side, the first token of each given."""
    nats, num_predicted = 0.0, 0
    for window in torch.tensor(token_ids).split(window_tokens):
        loss = float(model(input_ids=window[None], labels=window[None]).loss)
        nats += loss * (len(window) - 1)
        num_predicted += len(window) - 1
    return math.exp(nats / num_predicted)


def written_by(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Some sampled text, the same in every run."""
    torch.manual_seed(0)
    texts = []
    for start in ("The function returns", "If the argument is"):
        prompt = tokenizer(start, return_tensors="pt")
        output = model.generate(
            **prompt, max_new_tokens=100, do_sample=True, temperature=0.7, top_p=0.9
        )
        texts.append(tokenizer.decode(output[0, prompt.input_ids.shape[1] :]))
    return "\n".join(texts)


def words(text: str) -> list[str]:
    """The words of three letters or more; a name_with_lines counts as one word, not as three."""
    return [word for word in re.findall(r"\w+", text.lower()) if len(word) > 2 and word.isalpha()]


def share_known(text: str, known: set[str]) -> float:
    found = words(text)
    return sum(word in known for word in found) / max(1, len(found))
