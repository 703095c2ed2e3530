"""What to say of errors that other people's code raises: transformers' classes, tokenizers, peft.

They may be of any class and of any length. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from engine.json_file import one_line
from proto.errors import ModelError


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Make a sentence of whatever a tokenizer's own code raises.

    Args:
        what: went wrong.
    Raises:
        ModelError: with the first line of what it said.
    """
    try:
        yield
    except Exception as exc:
        raise ModelError(f"{what} ({first_line(exc)}): fetch its files again") from exc
    except BaseException as exc:
        # What a panic in the library's Rust becomes, which is no Exception.
        if type(exc).__name__ != "PanicException":
            raise
        raise ModelError(f"{what} ({first_line(exc)}): fetch its files again") from None


def first_line(exc: BaseException) -> str:
    """What to quote of foreign code's error in a sentence of ours."""
    lines = str(exc)[:4000].strip().splitlines()
    # "Validation error for field 'vocab_size':", and what it is follows below.
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1].strip()}"
    return one_line(lines[0]) if lines else type(exc).__name__
