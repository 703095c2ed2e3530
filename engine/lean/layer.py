"""A decoder layer as two parts with norms and residuals around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.attention import StepContext
from engine.lean.feed_forward import FeedForward
from engine.lean.norm import Norm
from engine.lean.turn import Tables

AttentionPart = Callable[[Tensor, "Tensor | None", "Tables | None", StepContext], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanLayer:
    """x + scale * after(part(before(x))), for attention and then for the feed-forward part.

    In a parallel layer both parts read x, and both are added to it.
    """

    attention: AttentionPart
    feed_forward: FeedForward
    before_attention: Norm | None
    after_attention: Norm | None
    before_feed_forward: Norm | None
    after_feed_forward: Norm | None
    scale: float = 1.0
    parallel: bool = False

    def __call__(self, x: Tensor, tables: Tables | None, step: StepContext) -> Tensor:
        """(tokens, hidden_size) to the same, never an alias of it."""
        if self.parallel:
            given = x if self.before_feed_forward is None else self.before_feed_forward(x)
            read = x if self.before_attention is None else self.before_attention(x)
            return self.feed_forward(given, self.attention(read, x, tables, step))
        read = x if self.before_attention is None else self.before_attention(x)
        if self.after_attention is None and self.scale == 1.0:
            x = self.attention(read, x, tables, step)
        else:
            x = self._added(x, self.attention(read, None, tables, step), self.after_attention)
        read = x if self.before_feed_forward is None else self.before_feed_forward(x)
        if self.after_feed_forward is None and self.scale == 1.0:
            return self.feed_forward(read, x)
        return self._added(x, self.feed_forward(read, None), self.after_feed_forward)

    def _added(self, x: Tensor, part: Tensor, after: Norm | None) -> Tensor:
        if after is not None:
            part = after(part)
        return x + part if self.scale == 1.0 else x + part * self.scale
