"""Import torch and transformers without what a process that only runs a model never uses.

A model's class brings transformers' code for sharding, training and compiling along: 1,000 modules,
80 MB resident, a second of a fast processor at each start. A process that does none of that says so
when it starts (`allow`); whoever is the first to need transformers then calls `prepare`, which
answers what transformers and torch ask meanwhile:

- is torch built with torch.distributed? No. So are torch's builds for some boards, and transformers
  leaves its sharding out. torch itself stays as it is.
- are packages there that transformers can use and does not need? No.
- three modules that bring much along and are asked for little stand aside (`Later`) until they are
  asked for something else. Then they are imported, and all is as if they had been there always.

It also has transformers read through its own files once instead of twice. Nothing of this is done
where transformers was imported before, or where torch or transformers are of versions that it was
not tried with: then all is imported.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from engine.later_module import FilesOfLater, Later, is_aside

# Tried with these, and no others: all modeling files import, all architectures of the tests run.
KNOWN_VERSIONS: Final = {"torch": ("2.13.",), "transformers": ("5.23.",)}

_is_allowed = False
_not_needed: tuple[str, ...] = ()


def allow(*not_needed: str) -> None:
    """Say, at the start of a process, that it will not train, shard or compile.

    Args:
        not_needed: packages that transformers can do without, and this process as well.
    """
    global _is_allowed, _not_needed
    _is_allowed, _not_needed = True, not_needed


def prepare() -> None:
    """Import transformers, leanly where that is allowed and known to work."""
    if _is_allowed and "transformers" not in sys.modules and _are_known_versions():
        _hide(_not_needed)
        sys.meta_path.insert(0, FilesOfLater())
        for later in (Sympy(), SymbolicShapes(), Dynamo()):
            later.stand_aside()
        _do_without_distributed()
        _read_files_once()
    importlib.import_module("transformers")


def _are_known_versions() -> bool:
    try:
        return all(
            metadata.version(package).startswith(known) for package, known in KNOWN_VERSIONS.items()
        )
    except metadata.PackageNotFoundError:  # built and put there by hand
        return False


def _hide(packages: Iterable[str]) -> None:
    """Have packages be as if they were not installed; None is what Python's manual names for it."""
    for package in packages:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def _do_without_distributed() -> None:
    """Have transformers ask once whether there is torch.distributed, and remember: no."""
    import torch.distributed
    from transformers.utils.import_utils import is_torch_distributed_available

    is_there = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        is_torch_distributed_available()  # remembers what it answered first
    finally:
        torch.distributed.is_available = is_there


def _read_files_once() -> None:
    """Have `transformers.models` know what `transformers` has read of the same 1,600 files.

    Each lists the names in them; the cache between the two forgets all but 128 folders.
    """
    library: Any = importlib.import_module("transformers.utils.import_utils")
    folder = Path(library.__file__).parents[1] / "models"
    read = library.define_import_structure
    known = {
        needs: {
            name.removeprefix("models."): what
            for name, what in names.items()
            if name.startswith("models.")
        }
        for needs, names in read(folder, prefix="models").items()  # which it remembers
    }
    library.define_import_structure = lambda path, *more, **settings: (
        known if path == str(folder / "__init__.py") else read(path, *more, **settings)
    )
    try:
        importlib.import_module("transformers.models")
    finally:
        library.define_import_structure = read


class Sympy(Later):
    """Asked by torch, of every operation on the meta device, whether a size is an expression."""

    class Basic:
        """Nothing is an instance of it, as long as nobody has imported sympy to make one."""

    def __init__(self) -> None:
        super().__init__("sympy")


Kinds = Callable[[tuple[Any, ...]], bool]


def _bools(given: tuple[Any, ...]) -> bool:
    return bool(given) and all(type(it) is bool for it in given)


def _a_bool(given: tuple[Any, ...]) -> bool:
    return len(given) == 1 and _bools(given)


def _a_number(given: tuple[Any, ...]) -> bool:
    return len(given) == 1 and type(given[0]) in (bool, int)


def _two_alike(given: tuple[Any, ...]) -> bool:
    """Two sizes, or two shapes."""
    return len(given) == 2 and (
        all(type(it) is int for it in given)
        or all(isinstance(it, tuple) and all(type(i) is int for i in it) for it in given)
    )


def _same(it: Any) -> Any:
    return it


class SymbolicShapes(Later):
    """Asked by torch, of every size and every comparison of sizes, whether it is an expression."""

    # What its functions say of plain numbers, and of which kinds of them.
    ANSWERS: Final[dict[str, tuple[Kinds, Callable[..., Any]]]] = {
        "expect_true": (_a_bool, _same),
        "guard_or_false": (_a_bool, _same),
        "guard_or_true": (_a_bool, _same),
        "guard_size_oblivious": (_a_bool, _same),
        "guarding_hint_or_throw": (_a_number, _same),
        "has_guarding_hint": (_a_number, lambda _: True),
        "is_nested_int": (_a_number, lambda _: False),
        "statically_known_true": (_a_bool, _same),
        "sym_and": (_bools, lambda *them: all(them)),
        "sym_eq": (_two_alike, operator.eq),
        "sym_or": (_bools, lambda *them: any(them)),
    }

    def __init__(self) -> None:
        super().__init__("torch.fx.experimental.symbolic_shapes")

    def __getattr__(self, name: str) -> Any:
        """A function that answers for plain numbers itself, or else as `Later`."""
        if name in self.ANSWERS:
            return functools.partial(self._answer, name)
        return super().__getattr__(name)

    def _answer(self, name: str, *numbers: Any, **settings: Any) -> Any:
        are_right, answer = SymbolicShapes.ANSWERS[name]
        if not settings and are_right(numbers):
            return answer(*numbers)
        return getattr(Later.whole(self), name)(*numbers, **settings)


class Dynamo(Later):
    """Asked, while modules are imported, to mark functions for the day when they are compiled."""

    # The one file of it that is used without anything being compiled: masks are made with it.
    LEAF: Final = "torch._dynamo._trace_wrapped_higher_order_op"
    alone = frozenset({LEAF})

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self._marked: list[tuple[str, Any]] = []

    def stand_aside(self) -> None:
        """As `Later`."""
        super().stand_aside()
        importlib.import_module(self.LEAF)

    # Who imported one of these before the module was run may call it afterwards.

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: Any = None, wrapping: bool = True
    ) -> Any:
        """Mark a function that is never compiled."""
        words = {"recursive": recursive, "reason": reason, "wrapping": wrapping}
        if fn is not None and not isinstance(fn, FunctionType):
            return Later.whole(self).disable(fn, **words)
        if fn is None:
            return functools.partial(self.disable, **words)
        disabled: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal disabled
            if is_aside(self):  # nothing is compiled yet
                return fn(*args, **kwargs)
            if disabled is None:
                disabled = self.disable(fn, **words)
            return disabled(*args, **kwargs)

        return call

    def allow_in_graph(self, fn: Any) -> Any:
        """Mark a function that is compiled as one operation."""
        return Dynamo._mark(self, "allow_in_graph", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        """Mark a function that always answers the same."""
        return Dynamo._mark(self, "assume_constant_result", fn)

    def _mark(self, how: str, fn: Any) -> Any:
        if not is_aside(self):
            return getattr(self, how)(fn)
        self._marked.append((how, fn))
        return fn

    def _run(self) -> None:
        marked = self.__dict__.pop("_marked")
        super()._run()
        for how, fn in marked:
            getattr(self, how)(fn)
