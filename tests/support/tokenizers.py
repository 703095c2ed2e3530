"""Small real tokenizers, trained here in a blink, in the layouts that checkpoints have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = "the quick brown fox jumps over a lazy dog. Olá, Zürich! naïve café 日本語 🙂🚂 "
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% for call in message['tool_calls'] %}"
    "<call>{{ call['function'] | tojson }}</call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 300, *, chat: bool = False) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have: any id sequence is some bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return _wrap(tokenizer, chat)


def byte_fallback_tokenizer() -> Any:
    """SentencePiece's layout, as Llama 2 and Mistral have: words with ▁, bytes for the rest."""
    vocab = {"<unk>": 0, **{token: 1 + at for at, token in enumerate(SPECIAL)}}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "▁the", "▁fox", "▁a", "the", "fox", "s", ".", "é", "\ufffd", "本"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _wrap(tokenizer, chat=False)


def save_tokenizer(folder: Path, vocab_size: int, *, chat: bool = False) -> Any:
    """Put a byte-level tokenizer into a checkpoint's folder."""
    tokenizer = byte_level_tokenizer(vocab_size, chat=chat)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _wrap(tokenizer: Tokenizer, chat: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
