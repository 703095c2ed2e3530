"""What a stage gets on a GPU while it is loaded, that it does not get on a CPU.

On a CPU nothing happens here. Each part is tried where it is made, and left out where it does not
compute the same.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.decode_fitting import fit_decoding
from engine.decode_graphs import Record, cuda_recorder
from engine.device_weights import device_seconds, hand_over
from engine.joined_linear import join_siblings
from engine.kernels import native
from engine.kernels.device_operators import operators_of
from engine.quantize import PackedParts

if TYPE_CHECKING:
    from engine.stage import Stage

log = logging.getLogger("comboio.engine")


def fit_weights(
    model: nn.Module, packed: PackedParts, dtype: torch.dtype, device: torch.device
) -> None:
    """Bring loaded weights into the forms that are multiplied best.

    Args:
        model: with the stage's weights, and no others.
        packed: what of them is packed.
        dtype: of hidden states.
    """
    operators = operators_of(device)
    if operators is None:
        return
    if packed.modules and not native.plain:
        with torch.inference_mode():
            hand_over(packed, dtype, device, operators, device_seconds(device))
    if dtype != torch.float32:  # there layers run as they are, each module by itself
        join_siblings(model.modules())
    # What was freed meanwhile is to be had by KV blocks, which ask the device what is free.
    torch.cuda.empty_cache()


def fit_steps(stage: Stage, *, cuda_graphs: bool, num_by_length: int) -> None:
    """Let a stage that has checked itself decode in the quickest way.

    Args:
        cuda_graphs: whether decode steps may be recorded.
        num_by_length: how many rotary tables of the model depend on a sequence's length.
    """
    if stage.device.type != "cuda":
        return
    record: Record | None = None
    if cuda_graphs and num_by_length:
        log.info(
            "decode steps are not recorded as CUDA graphs: rotary tables of this model depend on "
            "each sequence's length"
        )
    elif cuda_graphs:
        record = cuda_recorder(stage.device)
    fit_decoding(stage, record)
