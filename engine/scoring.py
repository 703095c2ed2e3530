"""How likely the tokens of a prompt are, each after those before it.

A pure function of logits and of the tokens that followed; the same arithmetic for a token and for
the likeliest ones, so that one which is both has the same number to the last bit.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from proto.errors import StepFailed

# Logits of so many values are made at one time: 32 MiB of them in float32, and as much again while
# they are summed, whatever the vocabulary.
PIECE_VALUES: Final = 8 * 1024 * 1024


def rows_at_once(vocab_size: int) -> int:
    """Rows of a prompt whose logits may exist at the same time."""
    return max(1, PIECE_VALUES // vocab_size)


def likelihoods(logits: Tensor, following: Tensor, top: int) -> bytes:
    """The log-probability of each row's next token, and the row's likeliest tokens.

    Args:
        logits: (rows, vocab_size) float32, on any device.
        following: (rows,) int64, the token that came behind each row.
        top: how many of the likeliest, from 0 to vocab_size.
    Returns:
        rows one after the other: log-probability float32; tokens int32[top], likeliest first;
        their log-probabilities float32[top]; little endian.
    Raises:
        StepFailed: logits hold NaN or infinity.
    """
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # a maximum is NaN as soon as one is
        raise StepFailed("the logits hold NaN or infinity")
    norm = logits.logsumexp(dim=-1, keepdim=True)
    own = logits.gather(1, following.to(logits.device).unsqueeze(1)) - norm
    values, tokens = logits.topk(top, dim=-1)
    rows = np.empty(
        len(logits), dtype=[("own", "<f4"), ("tokens", "<i4", (top,)), ("values", "<f4", (top,))]
    )
    rows["own"] = own.squeeze(1).cpu().numpy()
    rows["tokens"] = tokens.cpu().numpy()
    rows["values"] = (values - norm).cpu().numpy()
    return rows.tobytes()
