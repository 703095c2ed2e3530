"""Where in a model an adapter can be applied: its linear modules, by path.

Taken down while the model is still whole, on the meta device, so that every stage judges the
whole of an adapter alike, and knows which of its modules are its own. A module is linear by the
code that it runs, whatever its architecture calls it. Knows neither files nor steps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.architecture import Architecture
from engine.packed_linear import PackedLinear

AdapterShapes = Mapping[str, tuple[int, int]]  # path in the trained model -> (in, out) features


@dataclass(frozen=True, slots=True)
class Place:
    """One linear module of the whole model."""

    in_features: int
    out_features: int
    is_transposed: bool  # its weight lies as (in, out)
    is_before_layers: bool  # it runs before the first layer
    module: nn.Module | None  # None: of a section that is not here


class Places:
    """All modules of one model."""

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        layers_path: str,
        *,
        own: Collection[str],
        before: Collection[str],
    ) -> None:
        """Take down a model that is whole.

        Args:
            layers_path: of the decoder's list of layers.
            own: paths of modules (and of those they are within) whose weights this stage holds.
            before: paths of modules that run before the first layer.
        """
        self.model_name = architecture.name
        self._layers_path, self._is_nested = layers_path, architecture.nested
        self._kinds: dict[str, str] = {}  # of every module, its class's name
        self._linear: dict[str, Place] = {}
        prefixes = tuple(f"{path}." for path in own)
        for path, module in model.named_modules(remove_duplicate=False):
            is_packed = isinstance(module, PackedLinear)
            self._kinds[path] = module.kind if is_packed else type(module).__name__
            if is_linear(module):
                is_own = path in own or path.startswith(prefixes)
                in_features, out_features = linear_shape(module)
                self._linear[path] = Place(
                    in_features,
                    out_features,
                    is_transposed=not isinstance(module, (nn.Linear, PackedLinear)),
                    is_before_layers=path in before,
                    module=module if is_own else None,
                )
        self._renamed = _renamer(model)

    def __getitem__(self, path: str) -> Place:
        return self._linear[path]

    def __contains__(self, path: str) -> bool:
        return path in self._linear

    def kind_of(self, path: str) -> str | None:
        """The class of whatever module is there; None where nothing is."""
        return self._kinds.get(path)

    def find(self, shapes: AdapterShapes) -> dict[str, str]:
        """The path here of each module that was adapted there.

        A path that is found nowhere stays as it is. An adapter may have been trained on the whole
        of a multimodal model, of which only the language part is here, under another prefix; or by
        a release that had other names for some modules.
        """
        found = {path: self._renamed(path, self._kinds) for path in shapes}
        lost = [path for path in shapes if found[path] not in self._kinds]
        if lost and self._is_nested:
            found |= self._without_prefix({path: shapes[path] for path in lost})
        return found

    def _without_prefix(self, shapes: AdapterShapes) -> dict[str, str]:
        """Strip what a multimodal model puts before its language part.

        The prefix is the one under which most modules of a layer are as large as the layer's own
        here; parts for pictures and sound have layers as well, of other sizes.
        """
        own, _, leaf = self._layers_path.rpartition(".")
        own = f"{own}." if own else ""
        counts: Counter[str] = Counter()
        for path, shape in shapes.items():
            for match in re.finditer(rf"(?:^|\.)(?={re.escape(leaf)}\.\d+\.)", path):
                place = self._linear.get(own + path[match.end() :])
                if place is not None and (place.in_features, place.out_features) == shape:
                    counts[path[: match.end()]] += 1
        if not counts:
            return {}
        prefix = counts.most_common(1)[0][0]
        # "language_model.model." before the layers is "language_model." before the lm_head.
        outer = prefix[: -len(own)] if own and prefix.endswith(own) else ""
        found = {}
        for path in shapes:
            if path.startswith(prefix):
                found[path] = own + path[len(prefix) :]
            elif outer and path.startswith(outer):
                found[path] = path[len(outer) :]
        return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input with one matrix, and does nothing else.

    A subclass with a forward pass of its own, as some routers have, does something else.
    """
    if isinstance(module, PackedLinear):
        return True
    return isinstance(module, _plain_classes()) and any(
        type(module).forward is kind.forward for kind in _plain_classes()
    )


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    if isinstance(module, PackedLinear):
        return module.in_features, module.out_features
    weight: Any = module.weight
    first, second = weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _plain_classes() -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D


def _renamer(model: Any) -> Callable[[str, Container[str]], str]:
    """What turns a path of an earlier release into today's, by transformers' own rules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [it for it in mapping if isinstance(it, WeightRenaming)]
    prefix, names = model.base_model_prefix, dict.fromkeys(model.state_dict(), True)

    def renamed(path: str, known: Container[str]) -> str:
        if path in known:
            return path
        key, _ = rename_source_key(f"{path}.weight", renamings, [], prefix, names)
        today = key.removesuffix(".weight")
        return today if today in known else path

    return renamed
