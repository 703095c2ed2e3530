"""How many micro-batches the decoding sequences are spread over.

Over P stages at least P groups are needed for every stage to have work. One more hides the way
back (hops, sampling, the manager's turnaround), at the price that every stage reads its weights
once more a round. Pure arithmetic on what returned steps report.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

# Let t be the slowest stage's time for one decode step in P groups, f the part of it that does not
# shrink with the group (reading the weights), and w the time that this stage waits in a round. A
# round then takes P t + w in P groups, and (P + f) t in P + 1 smaller ones, if those leave no wait.
# So the extra group pays when w > f t. f is near one on an accelerator and smaller on a CPU, where
# several rows in a matrix product cost nearly as many times one; with a quarter, the stages work
# at least P / (P + 1/4) of the time whatever f is.
FIXED_SHARE: Final = 0.25
MEASURED_STEPS: Final = 16  # the median of so many decides; a pause or a slow start does not
# With P + 1 groups steps queue, and how long the way back is cannot be seen: look again sometimes.
MEASURE_EVERY_STEPS: Final = 512


class Pacer:
    """Chooses between P and P + 1 groups from measured times."""

    def __init__(self, num_stages: int, max_groups: int) -> None:
        self._num_stages = num_stages
        self._fewest = min(num_stages, max_groups)
        self._most = min(num_stages + 1, max_groups)
        self._groups = self._fewest
        self._steps = 0  # seen since the groups last changed
        # Of the newest steps: a round, and then each stage's part of it.
        self._rounds: deque[tuple[float, ...]] = deque(maxlen=MEASURED_STEPS)

    @property
    def groups(self) -> int:
        return self._groups

    def observe(self, stage_s: Sequence[float], elapsed_s: float) -> None:
        """Learn from one step of decode tokens that was not held up by a prompt before it.

        Args:
            stage_s: compute seconds, one a stage; anything else (no report) teaches nothing.
            elapsed_s: seconds from issue to return: in P groups, a whole round.
        """
        if len(stage_s) != self._num_stages:
            return
        self._steps += 1
        if self._groups > self._fewest:
            if self._steps == MEASURE_EVERY_STEPS:
                self._change_to(self._fewest)
        elif self._steps > 2 * self._num_stages:  # else it may have queued among more groups
            self._rounds.append((elapsed_s, *stage_s))
            if len(self._rounds) == MEASURED_STEPS and self._waits_too_long():
                self._change_to(self._most)

    def _waits_too_long(self) -> bool:
        medians: list[float] = [
            sorted(times)[MEASURED_STEPS // 2] for times in zip(*self._rounds, strict=True)
        ]
        round_s, slowest_s = medians[0], max(medians[1:])
        # Queueing before the slowest stage is part of the round, so it does not count as waiting.
        wait_s = round_s - self._num_stages * slowest_s
        return wait_s > FIXED_SHARE * slowest_s

    def _change_to(self, groups: int) -> None:
        self._groups, self._steps = groups, 0
        self._rounds.clear()
