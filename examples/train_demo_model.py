"""Train the demo model: a small Llama that writes like Python's own documentation.

Everything it reads is on every machine with Python: the docstrings, comments and reference topics
of the running standard library (PSF licence). What comes out is an ordinary checkpoint folder,
held-out text and figures included; Comboio uses it when no `--model` is given.

    python examples/train_demo_model.py --minutes 45                        # into engine/demo
    python examples/train_demo_model.py --steps 200 --output /tmp/demo      # a quick look

The budget may be in minutes or in steps; a minute goes on top for the corpus and the figures. The
same seed, steps and Python give the same corpus and the same order of it; the weights also depend
on the machine's arithmetic. Needs torch 2.9, for its Muon.
"""

import copy
import itertools
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a hub, so nothing may ask one

import click
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from stdlib_corpus import END_OF_TEXT, Document, documents, python_licence, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_TOKENS: Final = 4096
CONTEXT_TOKENS: Final = 1024
SHORT_TOKENS: Final = 256  # most sequences are this short: attention over them costs less
LONG_EVERY: Final = 6  # one step in so many sees sequences of the whole context
STEP_TOKENS: Final = 2048
EVAL_WINDOW_TOKENS: Final = 512
EVAL_TOKENS: Final = 16_384  # while training; the figures of the model card use all held-out text
MAX_HELDOUT_BYTES: Final = 200_000
MAX_WEIGHT_BYTES: Final = 8_000_000
EVALUATIONS: Final = 20


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a text: lower is better in each figure."""

    perplexity: float  # per token
    bits_per_byte: float  # does not depend on the tokenizer
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Budget:
    """When training ends: after so many steps, or after so many seconds."""

    steps: int | None
    seconds: float

    def spent(self, step: int, elapsed_s: float) -> float:
        """The part of the budget that is gone, from 0 to 1."""
        share = step / self.steps if self.steps else elapsed_s / self.seconds
        return min(1.0, share)


@dataclass(frozen=True, slots=True)
class Training:
    """What a run of the training loop cost and did."""

    steps: int
    tokens: int
    wall_s: float
    cpu_s: float
    arithmetic: str


console = Console()


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=Path("engine/demo"))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=45.0)
@click.option("--steps", type=click.IntRange(1), help="Train so many steps, whatever the time.")
@click.option("--seed", default=0)
@click.option("--threads", type=click.IntRange(1), default=2)
@click.option("--learning-rate", default=5e-3)
@click.option("--dropout", default=0.1, help="The corpus is small: it is read several times.")
@click.option("--max-documents", type=click.IntRange(2), help="Use only the first ones (to try).")
def main(
    output: Path,
    minutes: float,
    steps: int | None,
    seed: int,
    threads: int,
    learning_rate: float,
    dropout: float,
    max_documents: int | None,
) -> None:
    """Train the demo model on the standard library's own text and save it into --output."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = random.Random(seed)

    train, heldout = split(list(itertools.islice(documents(), max_documents)))
    heldout_text = cut("\n\n".join(document.text for document in heldout), MAX_HELDOUT_BYTES)
    tokenizer = train_tokenizer(train)
    sequences = [tokenizer.encode(document.text + END_OF_TEXT, verbose=False) for document in train]
    corpus = {
        "documents": len(train),
        "bytes": sum(len(document.text.encode()) for document in train),
        "tokens": sum(map(len, sequences)),
        "heldout_documents": len(heldout),
        "heldout_bytes": len(heldout_text.encode()),
    }
    console.print("corpus", corpus)

    model = LlamaForCausalLM(llama_config(tokenizer))
    untrained = score(model, tokenizer, heldout_text)
    console.print(f"held-out perplexity before training: {untrained.perplexity:.1f}")
    heldout_ids = tokenizer.encode(heldout_text, verbose=False)[:EVAL_TOKENS]
    training = fit(
        model,
        batches(sequences, rng),
        Budget(steps, minutes * 60),
        learning_rate,
        dropout,
        evaluate=lambda: loss_on(model, heldout_ids),
    )

    trained = score(model, tokenizer, heldout_text)
    console.print(f"after: {trained.perplexity:.2f}, {trained.bits_per_byte:.3f} bits per byte")
    arguments = ["--minutes", f"{minutes:g}"] if steps is None else ["--steps", str(steps)]
    arguments += ["--threads", str(threads), "--seed", str(seed)]
    figures = {"corpus": corpus, "untrained": asdict(untrained), "trained_float32": asdict(trained)}
    figures |= {"training": asdict(training), "arguments": arguments}
    save(output, model, tokenizer, heldout_text, figures)


def cut(text: str, max_bytes: int) -> str:
    """As much of the text as fits in so many bytes of UTF-8."""
    return text.encode()[:max_bytes].decode(errors="ignore")


# --- tokenizer and model --------------------------------------------------------------------------


def train_tokenizer(train: Iterable[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of GPT-2: any text goes in and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in train), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Eight layers, so that there is something to spread over two, three or four workers.

    Embeddings 4096 x 192, and per layer 2 x 192 x 192 + 2 x 192 x 64 of attention and
    3 x 192 x 512 of MLP, with the norms 3,935,424 weights: 7.87 MB of bf16.
    """
    end_id = tokenizer.eos_token_id
    return LlamaConfig(
        vocab_size=VOCAB_TOKENS,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )


# --- training -------------------------------------------------------------------------------------


def fit(
    model: LlamaForCausalLM,
    data: Iterator[Tensor],
    budget: Budget,
    learning_rate: float,
    dropout: float,
    evaluate: Callable[[], float],
) -> Training:
    """Train until the budget is spent; leave the best of the evaluated weights in the model."""
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    add_dropout(model, dropout)
    optimizers = optimizers_for(model, learning_rate)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    dtype = faster_dtype(model, next(data))
    best_loss, best_weights = math.inf, copy.deepcopy(model.state_dict())
    step, spent, evaluations, smooth_loss = 0, 0.0, 0, math.log(VOCAB_TOKENS)
    with progress_line() as progress:
        task = progress.add_task("training", total=1.0, loss=smooth_loss)
        while spent < 1.0:
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * schedule(spent)
            loss = train_step(model, optimizers, next(data), dtype)
            smooth_loss += 0.05 * (loss - smooth_loss)
            step += 1
            spent = budget.spent(step, time.monotonic() - started_s)
            progress.update(task, completed=spent, loss=smooth_loss)
            if spent * EVALUATIONS >= evaluations + 1 or spent == 1.0:
                evaluations = int(spent * EVALUATIONS)
                heldout_loss = evaluate()
                progress.console.print(
                    f"{spent:4.0%} step {step} loss {smooth_loss:.3f} held-out {heldout_loss:.3f}"
                )
                if heldout_loss < best_loss:
                    best_loss, best_weights = heldout_loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    return Training(step, step * STEP_TOKENS, round(wall_s), round(cpu_s), str(dtype))


def train_step(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    batch: Tensor,
    dtype: torch.dtype,
) -> float:
    """One forward and backward pass and one update; returns the loss in nats per token."""
    model.train()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return float(loss.detach())


def batches(sequences: list[list[int]], rng: random.Random) -> Iterator[Tensor]:
    """Endless batches of STEP_TOKENS: documents shuffled, joined, and cut where chance has it."""
    order, step = list(sequences), 0
    while True:
        rng.shuffle(order)
        stream = torch.tensor(list(itertools.chain.from_iterable(order)))
        stream = stream.roll(rng.randrange(CONTEXT_TOKENS))
        if len(stream) < STEP_TOKENS:  # only with --max-documents
            stream = stream.repeat(-(-STEP_TOKENS // len(stream)))
        blocks = list(
            stream[: len(stream) // CONTEXT_TOKENS * CONTEXT_TOKENS].split(CONTEXT_TOKENS)
        )
        rng.shuffle(blocks)
        per_step = STEP_TOKENS // CONTEXT_TOKENS
        for start in range(0, len(blocks) - per_step + 1, per_step):
            step += 1
            width = CONTEXT_TOKENS if step % LONG_EVERY == 0 else SHORT_TOKENS
            yield torch.cat(blocks[start : start + per_step]).view(-1, width)


def optimizers_for(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, Adam for the embeddings and the norms.

    After 250,000 tokens Muon was at a held-out loss of 5.5 where AdamW alone was at 6.2, for a
    sixth more time. Muon: https://kellerjordan.github.io/posts/muon, and arXiv:2502.16982 for how
    its rate is brought to AdamW's scale. Rows of the embedding are seldom met: a doubled rate.
    """
    layers = list(model.model.layers.parameters())
    matrices = [weight for weight in layers if weight.ndim == 2]
    others = [weight for weight in layers if weight.ndim == 1]
    others += [model.model.embed_tokens.weight, model.model.norm.weight]
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.Adam(others, lr=2 * learning_rate, betas=(0.9, 0.95), fused=True),
    ]


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Dropout on what each layer adds to the residual; Llama has none, and the file keeps none."""

    def drop(module: torch.nn.Module, _: Any, output: Tensor) -> Tensor:
        return torch.nn.functional.dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def schedule(spent: float) -> float:
    """Warm up over the first 2 % of the budget, then a cosine down to a fiftieth."""
    if spent < 0.02:
        return max(0.02, spent / 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (spent - 0.02) / 0.98))


def faster_dtype(model: LlamaForCausalLM, batch: Tensor) -> torch.dtype:
    """Time a pass in float32 and one under bfloat16 autocast: which wins depends on the CPU."""

    def seconds(dtype: torch.dtype) -> float:
        started_s = time.monotonic()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            model(input_ids=batch[:4], labels=batch[:4], use_cache=False).loss.backward()
        model.zero_grad()
        return time.monotonic() - started_s

    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        seconds(dtype)  # the first pass of each also sets things up
    return min(dtypes, key=seconds)


def progress_line() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


# --- figures --------------------------------------------------------------------------------------


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> Score:
    """Perplexity of the whole text in windows of EVAL_WINDOW_TOKENS, each on its own."""
    token_ids = tokenizer.encode(text, verbose=False)
    nats = loss_on(model, token_ids)
    bits_per_byte = nats / math.log(2) * len(token_ids) / len(text.encode())
    return Score(math.exp(nats), bits_per_byte, len(token_ids))


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, token_ids: list[int]) -> float:
    """Mean nats per predicted token; the first token of each window is given, not predicted."""
    model.eval()
    total, num_predicted = 0.0, 0
    for window in torch.tensor(token_ids).split(EVAL_WINDOW_TOKENS):
        if len(window) < 2:
            continue
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        num_predicted += len(window) - 1
    return total / num_predicted


# --- the folder -----------------------------------------------------------------------------------


def save(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    heldout_text: str,
    figures: dict[str, Any],
) -> None:
    """Write the checkpoint beside `output`, measure it as saved, then move it in file by file."""
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        staged = Path(folder)
        model.to(torch.bfloat16).save_pretrained(staged)
        generation_config(tokenizer).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        weight_bytes = (staged / "model.safetensors").stat().st_size
        if weight_bytes > MAX_WEIGHT_BYTES:
            raise click.ClickException(f"{weight_bytes} bytes of weights: more than is promised")

        saved = AutoModelForCausalLM.from_pretrained(staged, dtype=torch.bfloat16)
        figures |= {
            "trained": asdict(score(saved, tokenizer, heldout_text)),
            "eval_window_tokens": EVAL_WINDOW_TOKENS,
            "num_parameters": saved.num_parameters(),
            "weight_bytes": weight_bytes,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        (staged / "heldout.txt").write_text(heldout_text, encoding="utf-8")
        (staged / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
        (staged / "MODEL_CARD.md").write_text(model_card(figures, sample(saved, tokenizer)))
        (staged / "LICENSE-PYTHON.txt").write_text(python_licence(), encoding="utf-8")
        for path in sorted(staged.iterdir()):
            path.chmod(0o644)
            path.replace(output / path.name)
    console.print(f"saved {output}: perplexity {figures['trained']['perplexity']:.2f} in bfloat16")


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Sampling, since so small a model repeats itself when it always takes the likeliest token."""
    end_id = tokenizer.eos_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        bos_token_id=end_id,
        eos_token_id=end_id,
        pad_token_id=end_id,
    )


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """One continuation for the model card, always drawn with the same seed."""
    torch.manual_seed(0)
    prompt = tokenizer("The function returns", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=120)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def model_card(figures: dict[str, Any], text: str) -> str:
    corpus, training = figures["corpus"], figures["training"]
    before, after, exact = (figures[key] for key in ("untrained", "trained", "trained_float32"))
    return f"""\
---
license: other
license_name: PSF-2.0
pipeline_tag: text-generation
language: en
---

# Comboio's demo model

A Llama of {figures["num_parameters"]:,} weights in 8 layers ({figures["weight_bytes"]:,} bytes of
bf16), context {CONTEXT_TOKENS} tokens, byte-level BPE of {VOCAB_TOKENS} tokens. It exists so that
`manager` has something to run where no `--model` is given and no hub can be reached. It writes text
that looks like Python's documentation; it knows nothing, and what it says is not to be relied on.
It has no chat template on purpose.

## Data

The docstrings, comments and reference topics (`pydoc_data.topics`) of the standard library of
Python {figures["python"]}, copyright the Python Software Foundation, under PSF licence version 2
(`LICENSE-PYTHON.txt`; it also names the authors of incorporated software). Repeated paragraphs are
dropped. {corpus["documents"]} documents, {corpus["bytes"]:,} bytes, {corpus["tokens"]:,} tokens
to train on; {corpus["heldout_documents"]} documents ({corpus["heldout_bytes"]:,} bytes), chosen by
the hash of their name, in `heldout.txt`. Another version of Python gives slightly other text.

## Figures

On all of `heldout.txt`, windows of {EVAL_WINDOW_TOKENS} tokens, {after["num_tokens"]:,} tokens:

| | perplexity per token | bits per byte |
| --- | --- | --- |
| random weights | {before["perplexity"]:.1f} | {before["bits_per_byte"]:.3f} |
| trained, float32 | {exact["perplexity"]:.2f} | {exact["bits_per_byte"]:.3f} |
| trained, as saved in bf16 | {after["perplexity"]:.2f} | {after["bits_per_byte"]:.3f} |

The weights kept are the best of up to {EVALUATIONS} evaluations on the first {EVAL_TOKENS:,} of
those tokens, so the figures flatter the model a little.

A continuation of "The function returns", drawn with the saved settings and seed 0:

```text
{text}
```

## Making it again

    python examples/train_demo_model.py {" ".join(figures["arguments"])}

{training["steps"]:,} steps, {training["tokens"]:,} tokens, arithmetic {training["arithmetic"]};
{training["wall_s"] / 60:.1f} minutes by the clock and {training["cpu_s"] / 60:.1f} CPU minutes in
the training loop, on a machine that may have done other work at the same time. `--steps` in place
of `--minutes` asks for the same amount of training on any machine. torch {figures["torch"]},
transformers {figures["transformers"]}.
"""


if __name__ == "__main__":
    main()
