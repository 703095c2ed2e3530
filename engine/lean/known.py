"""Whether a module says no more of itself than is known.

A module that holds an attribute nobody here knows, or whose code reads a setting of the model that
nobody here knows, may compute something else at other positions or other numbers than it was tried
on; it is left alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, Final

from torch import nn

_OURS: Final = frozenset({"forward", "_fused", "_joined"})  # put there by this program
_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))
# Settings that decide how something is computed and not what.
_WITHOUT_EFFECT: Final = frozenset(
    {"_attn_implementation", "_experts_implementation", "pretraining_tp", "hidden_act"}
)


def says_only(module: Any, known: Collection[str]) -> bool:
    """Whether all attributes and settings of a module that say something are known."""
    for name in set(vars(module)) - _OF_EVERY_MODULE - set(known):
        if name not in _OURS and not is_idle(getattr(module, name)):
            return False
    config = getattr(module, "config", None)
    return all(
        name in known or name in _WITHOUT_EFFECT or is_idle(getattr(config, name, None))
        for name in _settings_read(type(module).forward)
    )


def is_idle(value: object) -> bool:
    """Whether an attribute asks for nothing."""
    return value is None or value is False or value == 0.0 or value == "" or value == ()


@lru_cache(maxsize=64)
def _settings_read(forward: Callable[..., Any]) -> frozenset[str]:
    """Which of the model's settings a module's forward reads."""
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return frozenset({"unknown"})
    return frozenset(re.findall(r"self\.config\.(\w+)", source))
