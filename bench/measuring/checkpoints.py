"""Write the checkpoint of a shape once, and keep it: safetensors in bfloat16, and a tokenizer.

Kept in COMBOIO_BENCH_CACHE, else in ~/.cache/comboio/bench. A folder is there as a whole or not at
all. The values are normal with a spread of 0.02, drawn from a table: a gigabyte takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path
from statistics import NormalDist
from string import ascii_letters
from typing import Any, Final

import numpy as np

from bench.measuring.shapes import Shape

SPREAD: Final = 0.02
ONE: Final = 0x3F80  # 1.0 in bfloat16
PIECE: Final = 16 * 2**20  # values drawn at once
END: Final = "<|end|>"
SPACE, LINE_BREAK = "\u0120", "\u010a"  # as GPT-2's byte-level BPE writes them


def cache_folder() -> Path:
    """Where models are kept between runs."""
    named = os.environ.get("COMBOIO_BENCH_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else home / "comboio" / "bench"


def checkpoint(shape: Shape) -> Path:
    """The folder of this shape's checkpoint, written if it was not there."""
    folder = cache_folder() / shape.key
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 2 * shape.num_parameters
    check_room(folder.parent, num_bytes, shape.what)
    print(f"writing {folder} ({num_bytes / 1e9:.1f} GB)", file=sys.stderr, flush=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        _write_json(building / "config.json", shape.config)
        write_tokenizer(building, shape.vocab_size)
        write_weights(building / "model.safetensors", shape)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if folder.is_dir():  # another run was faster
            return folder
        raise
    return folder


def check_room(folder: Path, num_bytes: int, what: str) -> None:
    """Leave with a sentence where a file of this size does not fit."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + 2**30:
        raise SystemExit(
            f"{what} needs {num_bytes / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB "
            "free: make room, or set COMBOIO_BENCH_CACHE to a folder on a larger disk."
        )


# --- weights ----------------------------------------------------------------------------------


def write_weights(path: Path, shape: Shape) -> None:
    """All tensors, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, sizes in shape.tensors():
        end = offset + 2 * prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = normal_table()
    random = np.random.Generator(np.random.SFC64(0))
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, sizes in shape.tensors():
            for piece in drawn(name, prod(sizes), values, random):
                file.write(piece.data)


def drawn(
    name: str, count: int, values: np.ndarray, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """A tensor's bits, in pieces. Norms are ones and biases zeros, as a fresh model has them."""
    is_norm = "norm" in name or ".ln_" in name or name.startswith("ln_")
    if name.endswith(".bias") or is_norm:
        yield np.full(count, 0 if name.endswith(".bias") else ONE, np.uint16)
        return
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        yield values[np.frombuffer(random.bytes(2 * size), np.uint16)]


def normal_table() -> np.ndarray:
    """65536 equally likely values of a normal distribution, as bits of bfloat16."""
    quantile = NormalDist(0, SPREAD).inv_cdf
    exact = np.array([quantile((i + 0.5) / 65536) for i in range(65536)], np.float32)
    return to_bf16(exact)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, as uint16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor's bits (uint16), mapped: nothing is read before it is used."""
    path = folder / "model.safetensors"
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    begin = 8 + header_bytes
    mapped = np.memmap(path, np.uint8, "r")
    return {
        name: mapped[begin + it["data_offsets"][0] : begin + it["data_offsets"][1]]
        .view(np.uint16)
        .reshape(it["shape"])
        for name, it in header.items()
        if name != "__metadata__"
    }


# --- tokenizer --------------------------------------------------------------------------------


def vocabulary(size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """(tokens, merges) of a byte-level BPE: every pair of letters, then triples, up to `size`.

    Of single bytes only printable ASCII and the line break: a random model writes half characters
    otherwise, which servers hold back until they are whole.
    """
    tokens = [END, SPACE, LINE_BREAK, *map(chr, range(ord("!"), ord("~") + 1))]
    merges = []
    pairs = [(left, right) for left, right in product(ascii_letters, repeat=2)]
    triples = ((left + right, third) for (left, right), third in product(pairs, ascii_letters))
    for merge in (*pairs, *triples):
        if len(tokens) >= size:
            break
        merges.append(merge)
        tokens.append("".join(merge))
    return tokens, merges


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """tokenizer.json and its config, as transformers reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = vocabulary(vocab_size)
    tokenizer = Tokenizer(
        models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(dict(content), indent=2), encoding="utf-8")
