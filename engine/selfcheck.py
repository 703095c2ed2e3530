"""Refuse, at load, a stage that would compute wrong tokens.

What an architecture's class says of itself proves nothing, so each stage feeds itself a few
random positions: once in one piece, and once in two chunks that share their steps with another
sequence. State that is not keys and values, a mask of its own, or sequences that leak into each
other make the two differ. Where keys and values are to be held in 8 bits, it then tries what those
are worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from engine.attention import StageRun
from proto.errors import ModelUnfit, UsageError

if TYPE_CHECKING:
    from engine.stage import Stage

_NUM_TOKENS: Final = 6
_CUT: Final = 4
# Differences come from the kernels' rounding alone. The median over rows is judged, since one
# token of a mixture of experts may be routed elsewhere by rounding.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Kernels for quantized weights round activations to 8 bits: where two runs differ in the last bit,
# one may be rounded up and the other down, by 1/127 of the largest.
QUANTIZED_TOLERANCE: Final = 0.1
# Rounding keys and values changes the hidden states of models that people use by some hundredths;
# beyond this, attention looks elsewhere.
KV_TOLERANCE: Final = 0.3


def check_stage(stage: Stage) -> None:
    """Run the check.

    Raises:
        ModelUnfit: the stage's results depend on how tokens are cut into steps, or are not
            numbers.
        UsageError: keys and values lose too much in 8 bits.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_NUM_TOKENS, stage.hidden_size)
    ours = torch.randn(shape, generator=generator).to(stage.dtype)
    other = torch.randn(shape, generator=generator).to(stage.dtype)
    ids = torch.randint(stage.vocab_size, (2, _NUM_TOKENS), generator=generator)
    cache = stage.exact_cache(3)

    def run(block: int, start: int, stop: int) -> StageRun:
        blocks = torch.tensor([block])
        return StageRun(
            start=start, num_tokens=stop - start, rope_length=_NUM_TOKENS, blocks=blocks
        )

    whole = stage.forward(ids[0], ours, [run(0, 0, _NUM_TOKENS)], cache)
    first = stage.forward(
        torch.cat([ids[1][:_CUT], ids[0][:_CUT]]),
        torch.cat([other[:_CUT], ours[:_CUT]]),
        [run(2, 0, _CUT), run(1, 0, _CUT)],
        cache,
    )
    second = stage.forward(
        torch.cat([ids[0][_CUT:], ids[1][_CUT:]]),
        torch.cat([ours[_CUT:], other[_CUT:]]),
        [run(1, _CUT, _NUM_TOKENS), run(2, _CUT, _NUM_TOKENS)],
        cache,
    )
    chunked = torch.cat([first[_CUT:], second[: _NUM_TOKENS - _CUT]])
    if not bool(torch.isfinite(whole).all()):
        raise ModelUnfit(
            f"{stage.architecture} cannot be split between layers {stage.start_layer} and "
            f"{stage.end_layer}: its layers give NaN on random input, so its weights are damaged "
            "or its layers need more than the hidden states of the layer before"
        )
    if stage.is_last and bool(stage.logits(whole).isnan().any()):
        raise ModelUnfit(
            f"the lm_head of {stage.model_name}, or the norm before it, gives NaN on numbers: "
            "the checkpoint is damaged, fetch it again"
        )
    error = relative_error(chunked[_CUT:], whole[_CUT:])
    if error > tolerance(stage):
        raise ModelUnfit(
            f"{stage.architecture} cannot be split: layers {stage.start_layer}:{stage.end_layer} "
            f"give other results in two chunks than in one (relative error {error:.2g}); it "
            "keeps state other than keys and values, or masks in a way of its own"
        )
    if stage.kv_quantize != "none":
        rounded = stage.forward(ids[0], ours, [run(1, 0, _NUM_TOKENS)], stage.new_cache(3))
        _check_rounding(stage, relative_error(rounded, whole))


def _check_rounding(stage: Stage, error: float) -> None:
    if not error <= KV_TOLERANCE:
        raise UsageError(
            f"--kv-quantize {stage.kv_quantize}: {stage.architecture}'s layers "
            f"{stage.start_layer}:{stage.end_layer} give other results with keys and values in "
            f"8 bits (relative error {error:.2g}): start the worker without it"
        )


def tolerance(stage: Stage) -> float:
    """How far two runs of the same tokens may differ."""
    return QUANTIZED_TOLERANCE if stage.quantize != "none" else TOLERANCE[stage.dtype]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Median over rows of |difference| / |expected|."""
    difference = (result.float() - expected.float()).norm(dim=1)
    ratios = difference / expected.float().norm(dim=1).clamp_min(1e-12)
    return float(ratios.median())
