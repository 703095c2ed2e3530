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

Nothing of this is done where transformers was imported before, or where torch or transformers are
of versions that it was not tried with: then all is imported.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
import threading
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any, Final

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
        for later in (Sympy(), SymbolicShapes(), Dynamo()):
            later.stand_aside()
        _do_without_distributed()
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


class Later(ModuleType):
    """Stands for a module until something is asked of it that it cannot answer.

    Then the real one is imported, in its place. Subclasses have what can be answered as attributes.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, f"{name}, which is imported when it is used.")
        self._folders: list[str] | None = None  # of a package
        self._real: Any = None
        self._is_importing = False
        self._lock = threading.RLock()

    def stand_aside(self) -> None:
        """Have importing the module give this, unless it was imported before or is not there."""
        name = self.__name__
        spec = None if name in sys.modules else find_spec(name)
        if spec is None:
            return
        self.__spec__, self.__file__ = spec, spec.origin
        self._folders = spec.submodule_search_locations
        sys.modules[name] = self
        package, _, leaf = name.rpartition(".")
        if package:
            setattr(importlib.import_module(package), leaf, self)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the real one has."""
        # Some look at every module that there is, and ask for names like __wrapped__. Who asks a
        # package for its path is about to import a file of it.
        if name.startswith("__") and not (name == "__path__" and self._folders):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> Any:
        """The real module, imported by now."""
        with self._lock:
            if self._is_importing:  # what it imports looks back
                return sys.modules[self.__name__]
            if self._real is None:
                self._is_importing = True
                try:
                    self._real = self._imported()
                finally:
                    self._is_importing = False
            return self._real

    def _imported(self) -> Any:
        name = self.__name__
        package, _, leaf = name.rpartition(".")
        if sys.modules.get(name) is self:
            del sys.modules[name]
        if package and vars(sys.modules[package]).get(leaf) is self:
            delattr(sys.modules[package], leaf)
        return importlib.import_module(name)  # puts itself into its package as well


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
        are_right, answer = self.ANSWERS[name]
        if not settings and are_right(numbers):
            return answer(*numbers)
        return getattr(self.real(), name)(*numbers, **settings)


class Dynamo(Later):
    """Asked, while modules are imported, to mark functions for the day when they are compiled."""

    # The one file of it that is used without anything being compiled: masks are made with it.
    LEAF: Final = "_trace_wrapped_higher_order_op"

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self._marked: list[tuple[str, Any]] = []

    def stand_aside(self) -> None:
        """As `Later`."""
        super().stand_aside()
        if self._folders is None:
            return
        self.__path__ = self._folders
        try:
            importlib.import_module(f"{self.__name__}.{self.LEAF}")
        finally:
            del self.__path__  # any other file of it brings all of it

    def disable(
        self, fn: Any = None, recursive: bool = True, *, reason: Any = None, wrapping: bool = True
    ) -> Any:
        """Mark a function that is never compiled."""
        words = {"recursive": recursive, "reason": reason, "wrapping": wrapping}
        if self._real is not None or not (fn is None or isinstance(fn, FunctionType)):
            return self.real().disable(fn, **words)
        if fn is None:
            return functools.partial(self.disable, **words)
        disabled: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal disabled
            if self._real is None:  # nothing is compiled yet
                return fn(*args, **kwargs)
            if disabled is None:
                disabled = self._real.disable(fn, **words)
            return disabled(*args, **kwargs)

        return call

    def allow_in_graph(self, fn: Any) -> Any:
        """Mark a function that is compiled as one operation."""
        return self._mark("allow_in_graph", fn)

    def assume_constant_result(self, fn: Any) -> Any:
        """Mark a function that always answers the same."""
        return self._mark("assume_constant_result", fn)

    def _mark(self, how: str, fn: Any) -> Any:
        if self._real is not None:
            return getattr(self._real, how)(fn)
        self._marked.append((how, fn))
        return fn

    def _imported(self) -> Any:
        real = super()._imported()
        importlib.import_module(f"{self.__name__}.{self.LEAF}")
        setattr(real, self.LEAF, sys.modules[f"{self.__name__}.{self.LEAF}"])
        for how, fn in self._marked:
            getattr(real, how)(fn)
        return real
