"""A chain of which only the time is pretended: when each stage works, and when a step is back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.requests import Event, Finished, Generated, RunStep, StepReturned
from engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Passage:
    """One step, once it is back."""

    command: RunStep
    issued_s: float
    returned_s: float
    worked: tuple[tuple[float, float], ...]  # by stage: from, to

    @property
    def num_decodes(self) -> int:
        return sum(run.draw > 0 for run in self.command.runs)


class TimedChain:
    """Stages that take `stage_s(tokens)` each for a step, and `overhead_s` for its way back."""

    def __init__(
        self,
        scheduler: Scheduler,
        stage_s: list[Callable[[int], float]],
        overhead_s: float,
    ) -> None:
        self.now_s = 0.0
        self.passages: list[Passage] = []
        self.generated: list[tuple[float, int]] = []  # when, of whom
        self.finished = 0
        self._scheduler = scheduler
        self._stage_s, self._overhead_s = stage_s, overhead_s
        self._free_at_s = [0.0] * len(stage_s)
        self._in_flight: deque[Passage] = deque()

    def handle(self, event: Event) -> None:
        for command in self._scheduler.handle(event):
            match command:
                case RunStep():
                    self._in_flight.append(self._passage(command))
                case Generated():
                    self.generated.append((self.now_s, command.sequence))
                case Finished():
                    self.finished += 1

    def step(self) -> None:
        """The next step comes back."""
        passage = self._in_flight.popleft()
        self.passages.append(passage)
        self.now_s = passage.returned_s
        self.handle(
            StepReturned(
                passage.command.step,
                {run.sequence: 1 for run in passage.command.runs if run.draws},
                {},
                tuple(end - start for start, end in passage.worked),
                passage.returned_s - passage.issued_s,
            )
        )

    def run_dry(self) -> None:
        while self._in_flight:
            self.step()

    def busy_shares(self, start_s: float, end_s: float) -> list[float]:
        """By stage, the part of this time in which it worked."""
        return [
            sum(
                max(0.0, min(to, end_s) - max(since, start_s))
                for since, to in (passage.worked[stage] for passage in self.passages)
            )
            / (end_s - start_s)
            for stage in range(len(self._stage_s))
        ]

    def _passage(self, command: RunStep) -> Passage:
        at_s, worked = self.now_s, []
        for stage, stage_s in enumerate(self._stage_s):
            start_s = max(at_s, self._free_at_s[stage])
            at_s = self._free_at_s[stage] = start_s + stage_s(command.num_tokens)
            worked.append((start_s, at_s))
        return Passage(command, self.now_s, at_s + self._overhead_s, tuple(worked))
