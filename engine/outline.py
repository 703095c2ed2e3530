"""Find out what a model runs before its first layer and what after its last.

Nothing in a config or a class says so; the model's own forward does. Every module with weights
outside the layers is replaced by a stand-in that notes being called, and the forward pass is run
up to the first layer. Needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine import attention
from engine.attention import StepContext
from engine.foreign_code import first_line
from engine.slots import Conductor, LayerSlot, SectionDone
from engine.weights import fill_buffers
from proto.errors import ModelUnfit

_CPU = torch.device("cpu")


class Nothing(nn.Module):
    """Stands where a module of another part was: answers NaN of the right shape.

    What it gives is replaced at the section's first layer. Were it used in any other way, the
    self-check would see NaN and refuse the model, instead of computing with made-up numbers.
    """

    def __init__(
        self,
        told: nn.Module,
        called: Callable[[], None] | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """`told` is the module it stands for; `called` hears of every call."""
        super().__init__()
        self._width = getattr(told, "embedding_dim", None)
        self._shape = getattr(getattr(told, "weight", None), "shape", None)
        self._out_features = getattr(told, "out_features", None)
        self._called, self._device = called, device

    @property
    def weight(self) -> Tensor:
        """For models that ask a module's weight where it lies, or use it without a call."""
        if self._shape is None:
            raise AttributeError("weight")
        return torch.full((), float("nan"), device=self._device).expand(self._shape)

    def forward(self, given: Tensor, *_args: Any, **_settings: Any) -> Tensor:
        """NaN in the shape that the module would have given."""
        if self._called is not None:
            self._called()
        shape: tuple[int, ...] = tuple(given.shape)
        if self._width is not None:
            shape = (*shape, self._width)
        elif self._out_features is not None:
            shape = (*shape[:-1], self._out_features)
        return torch.full((), float("nan"), device=given.device).expand(shape)


def before_and_after(
    model: Any, path: str, layers: nn.ModuleList, name: str
) -> tuple[set[str], set[str]]:
    """Paths of the modules with weights of their own that run before, and after, the layers.

    Args:
        model: the whole model on the meta device; as it was when this returns.
        path, layers: the decoder's list of layers.
        name: the architecture's, for messages.
    """
    outer = {
        where: module
        for where, module in model.named_modules()
        if where
        and where != path
        and not where.startswith(f"{path}.")
        and list(module.parameters(recurse=False))
    }
    before: set[str] = set()
    for where, module in outer.items():
        _put(model, where, Nothing(module, partial(before.add, where)))
    conductor = Conductor(0, 0, len(layers))
    put_slots(model, path, layers, conductor)
    fill_buffers(model, _CPU)
    try:
        run_to_first_layer(model, conductor, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    except Exception as exc:  # whatever foreign model code raises when it is run in part
        raise ModelUnfit(
            f"{name} cannot be split: its forward pass does not reach its layers on token ids "
            f"and positions alone ({first_line(exc)})"
        ) from exc
    finally:
        for where, module in outer.items():
            _put(model, where, module)
        _put(model, path, layers)
    return before, set(outer) - before


def run_to_first_layer(
    model: Any, conductor: Conductor, token_ids: Tensor, positions: Tensor | None
) -> Tensor:
    """What the first layer would get: (tokens, hidden_size) for (tokens,) ids and positions.

    Without positions, the model counts them itself.
    """
    run = attention.StageRun(
        start=0, num_tokens=len(token_ids), rope_length=len(token_ids), blocks=token_ids[:0]
    )
    context = StepContext(runs=[run], cache=None, device=_CPU, slots=token_ids[:0])
    conductor.layers_pass(None)
    with torch.inference_mode(), attention.running(context):
        try:
            model(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0) if positions is not None else None,
                use_cache=False,
            )
        except SectionDone:
            pass
    result, conductor.result = conductor.result, None
    if result is None:
        raise RuntimeError("no layer was called")
    return result[0]


def put_slots(model: nn.Module, path: str, layers: nn.ModuleList, conductor: Conductor) -> None:
    """Replace every decoder layer by its slot; layers outside the section are dropped."""
    slots = nn.ModuleList(
        LayerSlot(
            index,
            layer if conductor.start <= index < conductor.end else None,
            layer,
            conductor,
        )
        for index, layer in enumerate(layers)
    )
    _put(model, path, slots)


def stub_unloaded(model: nn.Module, device: torch.device = _CPU) -> None:
    """Put a stand-in wherever a module's weights were not loaded."""
    for where, module in list(model.named_modules()):
        own = list(module.parameters(recurse=False))
        if where and own and all(it.is_meta for it in own):
            _put(model, where, Nothing(module, device=device))


def _put(model: nn.Module, where: str, module: nn.Module) -> None:
    parent, _, leaf = where.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
