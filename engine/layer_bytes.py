"""How large the parts of a checkpoint's model are, without reading a tensor.

For whoever reckons before anything is loaded: a plan, or a worker that is asked for other layers.
"""

from __future__ import annotations

from engine import attention
from engine.architecture import read_architecture
from engine.checkpoint import Checkpoint
from engine.plan import LayerSizes, layer_sizes
from engine.sections import Section
from engine.stage_loading import choose_dtype


def measure_layers(model: str | None, dtype: str = "auto") -> LayerSizes:
    """The sizes of a model in the dtype that it will be held in, unquantized.

    Args:
        model: a folder, a hub id, or None for the demo model.
    Raises:
        ModelError: there is no checkpoint, or it cannot be run.
    """
    architecture = read_architecture(Checkpoint(model))
    chosen = choose_dtype(dtype, architecture)
    attention.register()
    return layer_sizes(architecture.build(chosen, attention.ATTENTION_NAME), architecture)


def section_bytes(sizes: LayerSizes, section: Section) -> int:
    """Of the weights of a section, the head's included where it is the last."""
    head_bytes = sizes.head_bytes if section.end == len(sizes.layer_bytes) else 0
    return sum(sizes.layer_bytes[section.start : section.end]) + head_bytes
