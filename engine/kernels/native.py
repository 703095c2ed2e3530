"""The compiled kernels: whether they are here, which instruction set they use, how many threads.

They were built at installation if a compiler was there; else, and with COMBOIO_KERNELS=torch,
`library` is None and callers take their torch path. So they do where what was built is of another
version than this file. COMBOIO_KERNELS also names one instruction set, which is for tests and for
finding a fault. Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch

from proto.errors import UsageError

# What the C code calls each element type (native.h).
DTYPES: Final[Mapping[torch.dtype, int]] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
INT8: Final = 3  # of keys and values in memory only
TORCH: Final = "torch"
AUTO: Final = "auto"
CHOICES: Final = (
    AUTO, TORCH, "portable", "avx2", "avx512", "avx512bf16", "amx", "neon", "dotprod",
)  # fmt: skip


# As in native.h.
VERSION: Final = 4


def _compiled() -> tuple[Any, str]:
    """The compiled module, or None and why not, with how to mend it."""
    try:
        from engine.kernels import _native  # type: ignore[attr-defined]
    except ImportError as exc:
        return None, (
            f"the compiled part of Comboio is not there ({exc}): "
            "install a C compiler (gcc or clang), then Comboio again"
        )
    found = getattr(_native, "VERSION", "an earlier one")
    if found != VERSION:
        return None, (
            f"the compiled part of Comboio, {_native.__file__}, is of another version "
            f"({found}, needed is {VERSION}): install Comboio again "
            "(in a checkout: pip install -e .)"
        )
    return _native, ""


_built, _why_not = _compiled()
library: Any = None  # the compiled module while its kernels are in use
plain = False  # whether torch was asked for by name: then nothing but its plain product computes


def choose(name: str) -> None:
    """Use the kernels of one instruction set, `auto` for the best, `torch` for none.

    Raises:
        UsageError: there is no such choice, or not on this machine.
    """
    global library, plain
    if name not in CHOICES:
        raise UsageError(
            f"no kernels are called {name!r}. COMBOIO_KERNELS is one of: {', '.join(CHOICES)}."
        )
    plain = name == TORCH
    if plain or (name == AUTO and _built is None):
        library = None
        return
    if _built is None:
        raise UsageError(
            f"the kernels {name!r} cannot be used here: {_why_not}; or unset COMBOIO_KERNELS."
        )
    try:
        _built.choose(name)
    except ValueError as exc:
        raise UsageError(
            f"the kernels {name!r} cannot be used here: {exc}. Unset COMBOIO_KERNELS for the best "
            f"there are."
        ) from exc
    library = _built


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """Choose kernels for a while."""
    before, allowed = library, _built.name() if _built is not None else ""
    choose(name)
    try:
        yield
    finally:
        if before is None:
            choose(TORCH)
        else:
            choose(_NAMES[allowed])


def available() -> list[str]:
    """Every choice that this machine can run, `torch` included, without `auto`."""
    before = name()
    found = []
    for choice in CHOICES[1:]:
        try:
            choose(choice)
        except UsageError:
            continue
        found.append(choice)
    choose(_NAMES[before])
    return found


# What each choice calls itself.
_NAMES: Final = {
    TORCH: TORCH,
    "portable": "portable",
    "avx2": "avx2",
    "avx512-vnni": "avx512",
    "avx512-vnni-bf16": "avx512bf16",
    "avx512-vnni-bf16+amx": "amx",
    "neon": "neon",
    "neon-dotprod": "dotprod",
}


def name() -> str:
    """The instruction set in use, such as "avx512-vnni-bf16+amx", or "torch" without kernels."""
    return TORCH if library is None else str(library.name())


def description() -> str:
    """`name()`, and where torch computes because something is amiss, what that is."""
    return name() if library is not None or _built is not None else f"{name()}, since {_why_not}"


def reads_bf12_best() -> bool:
    """Whether the kernels in use multiply by bf12 as it lies, not by way of bf16."""
    return library is not None and "bf16" in name()


def set_threads(threads: int) -> None:
    """Let kernels use so many threads, the caller's own included. Nothing to do without them."""
    if _built is not None:
        _built.set_threads(threads)


def threads() -> int:
    """How many threads kernels use; torch's where there are none."""
    return int(library.threads()) if library is not None else torch.get_num_threads()


choose(os.environ.get("COMBOIO_KERNELS", AUTO))
