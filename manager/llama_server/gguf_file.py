"""Look at a GGUF model before anything starts: whole or truncated, what it is, how large.

Reads the header alone, a few megabytes of hundreds of gigabytes; every length in it has a bound.
Knows the file format (version 2 and 3), no program and no memory.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from proto.errors import ModelError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

# Far more than any model has; a damaged file announces more.
MAX_KEYS: Final = 1_000_000
MAX_TENSORS: Final = 1_000_000
MAX_DIMENSIONS: Final = 8
MAX_TEXT_BYTES: Final = 64 * 1024 * 1024  # a chat template, a token
MAX_ITEMS: Final = 100_000_000
KEPT_ITEMS: Final = 4096  # of an array: one number a layer is the longest that is used

# Value types of the header: number -> struct format. 8 is a text, 9 an array.
NUMBERS: Final = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT: Final = 8
ARRAY: Final = 9

# Tensor type -> (values in a block, bytes of a block), as ggml.h has them.
BLOCKS: Final[Mapping[int, tuple[int, int]]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
}

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")

Value = int | float | bool | str | list[int | float | bool]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What the header of a model says; a split model is one."""

    path: Path  # of the first part
    parts: tuple[Path, ...]
    architecture: str
    name: str
    num_layers: int
    context_length: int  # that it was trained for; 0 where the file does not say
    embedding_length: int
    vocab_size: int
    file_bytes: int  # of all parts
    weight_bytes: int
    kv_bytes_per_token: int  # of float16 keys and values, all layers


def read_model(path: Path) -> ModelFile:
    """Check a model and say what it is.

    Raises:
        ModelError: it is missing, not a GGUF file, cut short, or a part of it is missing.
    """
    parts = _parts_of(_checked_path(path))
    headers = [_read_header(part) for part in parts]
    first = headers[0]
    architecture = _text(first, "general.architecture")
    if not architecture:
        raise ModelError(f"{path} does not say its architecture: it is not a model to run.")
    if architecture == "clip":
        raise ModelError(f"{path} has only what a model sees pictures with: name the model itself.")

    def count(key: str) -> int:
        value = first.values.get(f"{architecture}.{key}")
        return value if isinstance(value, int) else 0

    num_layers, context_length = count("block_count"), count("context_length")
    embedding_length = count("embedding_length")
    return ModelFile(
        path=parts[0],
        parts=tuple(parts),
        architecture=architecture,
        name=_text(first, "general.name") or path.stem,
        num_layers=num_layers,
        context_length=context_length,
        embedding_length=embedding_length,
        vocab_size=first.lengths.get("tokenizer.ggml.tokens", 0),
        file_bytes=sum(header.file_bytes for header in headers),
        weight_bytes=sum(header.tensor_bytes for header in headers),
        kv_bytes_per_token=_kv_bytes_per_token(first, architecture, num_layers, embedding_length),
    )


# --- which files -----------------------------------------------------------------------------


def _checked_path(path: Path) -> Path:
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        hint = f": name {inside[0]}" if len(inside) == 1 else ", not a file"
        if not inside and (path / "config.json").is_file():
            hint = ": llama.cpp's convert_hf_to_gguf.py makes a .gguf file of such a checkpoint"
        raise ModelError(f"model {path} is a folder{hint}.")
    if not path.exists():
        raise ModelError(f"model {path}: there is no such file.")
    return path


def _parts_of(path: Path) -> list[Path]:
    """All files of the model, from the name of its first."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["parts"])
    parts = [
        path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    if path != parts[0] or int(match["part"]) != 1:
        raise ModelError(f"model {path} is not the first part of its model: name {parts[0]}.")
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelError(
            f"model {path} has {count} parts and {len(missing)} of them are missing, the first is "
            f"{missing[0]}: put all parts into {path.parent}."
        )
    return parts


# --- the header ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Header:
    """One file."""

    file_bytes: int
    values: dict[str, Value]  # without texts in arrays
    lengths: dict[str, int]  # of arrays
    tensor_bytes: int


class _Damaged(Exception):
    """The header says something that no writer writes."""


class _Reader:
    """Reads values one after the other."""

    def __init__(self, file: BinaryIO, order: str) -> None:
        self._file, self._order = file, order

    def bytes(self, count: int) -> bytes:
        """So many of them; EOFError when the file ends before."""
        found = self._file.read(count)
        if len(found) < count:
            raise EOFError
        return found

    def number(self, kind: str) -> int:
        """One whole number."""
        found = struct.unpack(self._order + kind, self.bytes(struct.calcsize(kind)))[0]
        assert isinstance(found, int)
        return found

    def numbers(self, kind: str, count: int) -> list[int | float | bool]:
        """So many numbers."""
        return list(
            struct.unpack(f"{self._order}{count}{kind}", self.bytes(struct.calcsize(kind) * count))
        )

    def text(self) -> str:
        """A text after its length."""
        return self.bytes(self.bounded("Q", MAX_TEXT_BYTES)).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        """Go on behind so many bytes."""
        self._file.seek(count, os.SEEK_CUR)

    def bounded(self, kind: str, limit: int) -> int:
        """A number that cannot be larger than this."""
        found = self.number(kind)
        if found > limit:
            raise _Damaged(f"it announces {found} where at most {limit} make sense")
        return found

    def position(self) -> int:
        """Bytes read or skipped."""
        return self._file.tell()


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            reader = _Reader(file, _byte_order(path, file.read(8)))
            return _read_body(path, reader, file_bytes)
    except OSError as exc:
        raise ModelError(f"model {path} cannot be read: {exc.strerror}.") from exc
    except EOFError:
        raise ModelError(
            f"model {path} is cut short: it ends after {path.stat().st_size} bytes, inside its "
            "header. Copy or download it again."
        ) from None
    except _Damaged as exc:
        raise ModelError(f"model {path} is damaged: {exc}. Copy or download it again.") from None


def _byte_order(path: Path, start: bytes) -> str:
    """`<` or `>`, from the magic and the version.

    Raises:
        ModelError: it is no GGUF, or one of another version.
    """
    if not start:
        raise ModelError(f"model {path} is empty: copy or download it again.")
    if start.startswith(b"version "):
        raise ModelError(
            f"model {path} is only a pointer of Git LFS: get the file with git lfs pull."
        )
    if start[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg", b"nugg"):
        raise ModelError(
            f"model {path} is of a format from before GGUF: convert it with an older llama.cpp, "
            "or get a .gguf file of the model."
        )
    if start[:4] != MAGIC:
        raise ModelError(
            f"model {path} is not a GGUF file (it begins with {start[:4]!r}): name a .gguf file; "
            "llama.cpp's convert_hf_to_gguf.py makes one of a Hugging Face checkpoint."
        )
    if len(start) < 8:
        raise EOFError
    for order in "<>":
        if struct.unpack(f"{order}I", start[4:])[0] in VERSIONS:
            return order
    raise ModelError(
        f"model {path} is GGUF version {struct.unpack('<I', start[4:])[0]}; "
        f"known are {' and '.join(map(str, VERSIONS))}: convert it again."
    )


def _read_body(path: Path, reader: _Reader, file_bytes: int) -> _Header:
    num_tensors = reader.bounded("Q", MAX_TENSORS)
    header = _Header(file_bytes, {}, {}, 0)
    for _ in range(reader.bounded("Q", MAX_KEYS)):
        key = reader.text()
        _read_value(reader, key, header)
    tensors = [_read_tensor(reader) for _ in range(num_tensors)]
    alignment = header.values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise _Damaged(f"its alignment is {alignment}")
    begin = -(-reader.position() // alignment) * alignment
    # Where the type of a tensor is newer than this file, its bytes are not known: 0 of them.
    needed = max((begin + offset + num_bytes for offset, num_bytes in tensors), default=begin)
    if file_bytes < needed:
        raise ModelError(
            f"model {path} is cut short: it has {file_bytes} bytes and its tensors go to byte "
            f"{needed}. Copy or download it again."
        )
    header.tensor_bytes = sum(num_bytes for _, num_bytes in tensors)
    return header


def _read_value(reader: _Reader, key: str, header: _Header) -> None:
    kind = reader.number("I")
    if kind == TEXT:
        header.values[key] = reader.text()
    elif kind in NUMBERS:
        header.values[key] = reader.numbers(NUMBERS[kind], 1)[0]
    elif kind == ARRAY:
        item, length = reader.number("I"), reader.bounded("Q", MAX_ITEMS)
        header.lengths[key] = length
        if item == TEXT:
            for _ in range(length):
                reader.bytes(reader.bounded("Q", MAX_TEXT_BYTES))
        elif item not in NUMBERS:
            raise _Damaged(f"its key {key!r} is an array of type {item}")
        elif length <= KEPT_ITEMS:
            header.values[key] = reader.numbers(NUMBERS[item], length)
        else:
            reader.skip(struct.calcsize(NUMBERS[item]) * length)
    else:
        raise _Damaged(f"its key {key!r} is of type {kind}")


def _read_tensor(reader: _Reader) -> tuple[int, int]:
    """(offset, bytes) of one tensor."""
    reader.text()
    num_values = 1
    for _ in range(reader.bounded("I", MAX_DIMENSIONS)):
        num_values *= reader.bounded("Q", 2**48)
    kind, offset = reader.number("I"), reader.number("Q")
    values_in_block, block_bytes = BLOCKS.get(kind, (1, 0))
    return offset, -(-num_values // values_in_block) * block_bytes


def _text(header: _Header, key: str) -> str:
    value = header.values.get(key)
    return value if isinstance(value, str) else ""


def _kv_bytes_per_token(
    header: _Header, architecture: str, num_layers: int, embedding_length: int
) -> int:
    """Keys and values of one token in float16."""

    def value(key: str) -> Value | None:
        return header.values.get(f"{architecture}.{key}")

    heads = value("attention.head_count")
    head_count = max(heads, default=0) if isinstance(heads, list) else heads
    if not isinstance(head_count, int) or head_count < 1:
        return 0
    kv_heads = value("attention.head_count_kv")
    in_layers = kv_heads if isinstance(kv_heads, list) else [kv_heads or head_count] * num_layers
    key_length = value("attention.key_length") or embedding_length // head_count
    value_length = value("attention.value_length") or embedding_length // head_count
    if not isinstance(key_length, int) or not isinstance(value_length, int):
        return 0
    return sum(int(it) for it in in_layers if isinstance(it, int)) * (key_length + value_length) * 2
