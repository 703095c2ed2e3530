"""Stand in for decoder layers, so that a model's own forward runs just one section.

Every place in the decoder's list is taken by a `LayerSlot`. Slots before the section pass their
input through; the section's first slot puts the received hidden states in; its last one takes
what leaves and ends the forward pass. For the final norm and lm_head, all slots pass through and
the last one puts the hidden states in. Knows no architecture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from engine.attention import current

if TYPE_CHECKING:
    from engine.lean.layer import LeanLayer


class SectionDone(Exception):
    """The section's last layer has run; nothing after it belongs to this pass."""


class Conductor:
    """What the slots of one model share: where the section lies, what goes in, what came out."""

    def __init__(self, start: int, end: int, num_layers: int) -> None:
        self.start, self.end, self.num_layers = start, end, num_layers
        self.hidden: Tensor | None = None  # (1, tokens, hidden_size) to put in
        self.result: Tensor | None = None  # what left the last layer
        self.only_tail = False  # pass through all layers, to what follows them
        self.returns_tuple = False  # what this model's layers return; learnt from the first run

    def layers_pass(self, hidden: Tensor | None) -> None:
        """Prepare to run the section's layers on `hidden`; None keeps what the model feeds in."""
        self.hidden, self.result, self.only_tail = hidden, None, False

    def tail_pass(self, hidden: Tensor) -> None:
        """Prepare to run what follows the last layer on `hidden`."""
        self.hidden, self.result, self.only_tail = hidden, None, True


class LayerSlot(nn.Module):
    """One place in the decoder's list of layers."""

    def __init__(
        self, index: int, inner: nn.Module | None, told: Any, conductor: Conductor
    ) -> None:
        """
        Args:
            index: global layer index.
            inner: the real layer, or None outside the section.
            told: the layer as built on the meta device; answers for plain attributes that the
                model's forward reads from its layers (`attention_type`, ...).
        """
        super().__init__()
        self.index = index
        self.inner = inner
        self.lean: LeanLayer | None = None  # what runs in its place, in most steps
        self._conductor = [conductor]  # in a list, since a module's attribute would be a child
        self._told = {
            name: value
            for name, value in vars(told).items()
            if not name.startswith("_") and isinstance(value, (str, int, float, bool, type(None)))
        }

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            told = self.__dict__.get("_told", {})
            if name in told:
                return told[name]
            raise

    def forward(self, hidden: Tensor, *args: Any, **settings: Any) -> Any:
        """Run, pass through, or end the pass; see the module's docstring."""
        conductor = self._conductor[0]
        if conductor.only_tail:
            if self.index == conductor.num_layers - 1:
                hidden = conductor.hidden if conductor.hidden is not None else hidden
            return (hidden,) if conductor.returns_tuple else hidden
        if self.inner is None:
            if conductor.start == conductor.end:  # no layers at all: only what comes before them
                conductor.result = hidden
                raise SectionDone
            return (hidden,) if conductor.returns_tuple else hidden
        if self.index == conductor.start and conductor.hidden is not None:
            hidden = conductor.hidden
        step = current()
        step.enter_layer(self.index)
        if self.lean is None or step.plainly:
            out = self.inner(hidden, *args, **settings)
        else:
            out = self.lean(hidden[0], settings.get("position_embeddings"), step).unsqueeze(0)
        conductor.returns_tuple = isinstance(out, tuple)
        if self.index == conductor.end - 1:
            conductor.result = out[0] if isinstance(out, tuple) else out
            raise SectionDone
        return out
