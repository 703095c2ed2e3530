"""Draw the next token of one sequence from its logits.

A pure function of (logits, parameters, seed, how many tokens were drawn before): who shares the
batch, and whether the step is a replay, cannot change the token. The order of the filters is
that of transformers' `generate`: repetition penalty, offsets, mask, temperature, top-k, top-p,
min-p.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from proto.errors import StepFailed
from proto.messages import Sampling

Top = list[tuple[int, float]]


def draw(
    logits: Tensor,
    sampling: Sampling,
    history: Tensor | None = None,
    offsets: tuple[Tensor, Tensor] | None = None,
    allowed: Tensor | None = None,
) -> tuple[int, float | None, Top]:
    """Draw one token.

    Args:
        logits: (vocab_size,) float32.
        sampling: temperature 0 takes the most likely token.
        history: (distinct,) int64, the token ids that the repetition penalty applies to.
        offsets: ((n,) int64 distinct token ids, (n,) float32 to add to their logits).
        allowed: (vocab_size,) bool, the tokens that may be drawn; None: all.
    Returns:
        the token, its log-probability, and the most likely `sampling.logprobs` tokens with
        theirs (None and empty where no logprobs were asked for). Log-probabilities are of the
        model's own distribution, before penalty, offsets, mask, temperature and filters.
    Raises:
        StepFailed: the logits hold NaN, or no finite value at all; or nothing is allowed.
    """
    best = logits.max()
    if not bool(torch.isfinite(best)):  # max() is NaN as soon as one logit is
        raise StepFailed("the logits hold NaN or infinity")
    penalised = _penalise(logits, sampling.repetition_penalty, history)
    if offsets is not None:
        penalised = penalised.index_add(0, *offsets)
    if allowed is not None:
        penalised = penalised.masked_fill(~allowed, -math.inf)
        if not bool(torch.isfinite(penalised.max())):
            raise StepFailed("the mask allows no token")
    if sampling.temperature == 0:
        token = int(penalised.argmax())
    else:
        token = _draw_at_random(penalised, sampling)
    if not sampling.logprobs:
        return token, None, []
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    values, tokens = logprobs.topk(min(sampling.logprobs, logits.shape[0]))
    return token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))


def uniform(seed: int, draws: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments, on any machine."""
    digest = hashlib.blake2b(f"{seed}:{draws}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _penalise(logits: Tensor, penalty: float, history: Tensor | None) -> Tensor:
    """CTRL's penalty (arXiv:1909.05858): seen tokens' logits lose, whatever their sign."""
    if penalty == 1.0 or history is None or not len(history):
        return logits
    seen = logits[history]
    penalised = logits.clone()
    penalised[history] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return penalised


def _draw_at_random(logits: Tensor, sampling: Sampling) -> int:
    """Filter in order of probability, then invert the cumulated probabilities at one number."""
    # Below the largest, so that no temperature, however small, makes infinities of them.
    scaled = (logits.double() - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        # topk is far cheaper than sorting a vocabulary of 100,000; ties go to the lower id
        # in neither, so both sort stably afterwards.
        kept, tokens = scaled.topk(sampling.top_k)
        order = torch.argsort(tokens)
        tokens, kept = tokens[order], kept[order]
        order = torch.argsort(kept, descending=True, stable=True)
        tokens, kept = tokens[order], kept[order]
    else:
        kept, tokens = torch.sort(scaled, descending=True, stable=True)
    probabilities = torch.softmax(kept, dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities
        keep = int((before < sampling.top_p).sum())
        probabilities = probabilities[: max(1, keep)]
        probabilities = probabilities / probabilities.sum()
    if sampling.min_p > 0.0:
        keep = int((probabilities >= sampling.min_p * probabilities[0]).sum())
        probabilities = probabilities[: max(1, keep)]
    # What has no chance at all is never drawn, not even where rounding ends beyond the last one.
    probabilities = probabilities[: max(1, int((probabilities > 0).sum()))]
    cumulated = probabilities.cumsum(dim=-1)
    target = uniform(sampling.seed, sampling.draw) * float(cumulated[-1])
    place = int(torch.searchsorted(cumulated, target, right=True))
    if not math.isfinite(target):
        raise StepFailed("the logits hold NaN or infinity")
    return int(tokens[min(place, len(cumulated) - 1)])
