"""A module that Python runs when something of it is needed, and not when it is imported.

As `importlib.util.LazyLoader` does it; but a subclass can answer some questions before, and a
package is run before any file of it. Knows no module by name.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any, ClassVar, Final


class Later(ModuleType):
    """A module that is there, and is not run until something is asked of it that it cannot answer.

    Then it becomes an ordinary module: the same object, so whoever imported it has the whole of it.
    What can be answered before stands in subclasses.
    """

    alone: ClassVar[frozenset[str]] = frozenset()  # files of a package that do not need the whole

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = None

    def stand_aside(self) -> None:
        """Have importing the module give this, unless it was imported before or is not there."""
        name = self.__name__
        spec = None if name in sys.modules else find_spec(name)
        if spec is None:
            return
        self.__spec__, self.__loader__, self.__package__ = spec, spec.loader, spec.parent
        self.__file__ = spec.origin
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        sys.modules[name] = self
        package, _, leaf = name.rpartition(".")
        if package:
            setattr(importlib.import_module(package), leaf, self)

    def __getattr__(self, name: str) -> Any:
        """Whatever the module has once it was run."""
        # Some look at every module that there is, and ask for names like __wrapped__.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> Any:
        """The module, run by now."""
        with _running:
            if is_aside(self):
                self._run()
        return self

    def _run(self) -> None:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        try:
            self.__spec__.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(self.__name__, None)  # who imports it again hears of it again
            raise


_running: Final = threading.RLock()


def is_aside(module: ModuleType) -> bool:
    """Whether it is still to be run."""
    return isinstance(module, Later)


class FilesOfLater(MetaPathFinder):
    """Has a package run before the first of its files, as it would have been."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, Later) or name in package.alone:
            return None
        package.whole()
        there = sys.modules.get(name)  # as a rule it has imported the file itself
        return None if there is None else spec_from_loader(name, _Given(there))


class _Given(Loader):
    """Gives a module that is there already to who is about to import it."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec
