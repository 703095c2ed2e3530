"""A chain of pretended workers that compute a toy model from the KV blocks they really keep.

Each stage has a queue and a memory of blocks. A token's hidden state at a stage depends on every
KV entry before it, read through the block table, so a wrong table, a block reused too early, a
position off by one or KV that was never computed anew gives other tokens than `unbatched`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.requests import PlannedRun, Request, RunStep, StepReturned

GARBAGE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyModel:
    """What is computed; the same however it is cut and batched."""

    num_layers: int = 4
    vocab_size: int = 40
    rope_switch: int | None = None  # LongRoPE: past this length all positions use other tables
    rope_by_length: bool = False  # dynamic NTK: tables depend on the length itself

    def table(self, rope_length: int, position: int) -> int:
        length = max(rope_length, position + 1)
        if self.rope_switch is not None:
            return int(length > self.rope_switch)
        return length if self.rope_by_length else 0

    def kv(self, layer: int, position: int, table: int, hidden: int) -> int:
        return hash((layer, position, table, hidden)) & 0xFFFFFFFF

    def attend(self, layer: int, hidden: int, context: Sequence[int]) -> int:
        return hash((layer, hidden, tuple(context))) & 0xFFFFFFFF

    def draw(self, hidden: int, draw: int) -> int:
        return hash((hidden, draw)) % self.vocab_size

    def score(self, hidden: int, next_token: int) -> int:
        return hash((hidden, next_token, "score"))

    def salt(self, request_prompt: Sequence[int]) -> int:
        return len(request_prompt) if self.rope_by_length else 0


def unbatched(model: ToyModel, request: Request, max_context: int) -> list[int]:
    """What the request generates alone; a drawn end token included, as the last."""
    tokens, drawn = list(request.prompt), 0
    if not request.max_new_tokens:
        return []
    base, layers = len(tokens), [list[int]() for _ in range(model.num_layers)]
    while True:
        switch = model.rope_switch
        if switch is not None and base <= switch < len(tokens):
            base, layers = len(tokens), [list[int]() for _ in range(model.num_layers)]
        hidden = 0
        for position in range(len(layers[0]), len(tokens)):
            hidden = tokens[position]
            table = model.table(base, position)
            for layer, context in enumerate(layers):
                context.append(model.kv(layer, position, table, hidden))
                hidden = model.attend(layer, hidden, context)
        tokens.append(model.draw(hidden, drawn))
        drawn += 1
        if tokens[-1] in request.eos or drawn == request.max_new_tokens:
            return tokens[len(request.prompt) :]
        if len(tokens) == max_context:
            return tokens[len(request.prompt) :]


def scores_alone(model: ToyModel, request: Request) -> list[int]:
    """How likely each token of the prompt is, from the second on."""
    prompt, layers = request.prompt, [list[int]() for _ in range(model.num_layers)]
    scores = []
    for position, token in enumerate(prompt[:-1]):
        hidden, table = token, model.table(len(prompt), position)
        for layer, context in enumerate(layers):
            context.append(model.kv(layer, position, table, hidden))
            hidden = model.attend(layer, hidden, context)
        scores.append(model.score(hidden, prompt[position + 1]))
    return scores


@dataclass(slots=True)
class ToyStep:
    """A step on its way: what the frame between two stages would carry."""

    command: RunStep
    hidden: list[list[int]]  # by run, by token
    faults: dict[int, str] = field(default_factory=dict)


class ToyChain:
    """`num_stages` stages over the model's layers, each with its own blocks and its own queue."""

    def __init__(
        self,
        model: ToyModel,
        num_stages: int,
        num_blocks: int,
        block_tokens: int,
        rng: random.Random,
    ) -> None:
        self._model = model
        self._rng = rng
        self._block_tokens = block_tokens
        bounds = [model.num_layers * stage // num_stages for stage in range(num_stages + 1)]
        self._layers = [range(bounds[i], bounds[i + 1]) for i in range(num_stages)]
        self._queues: list[deque[ToyStep]] = [deque() for _ in range(num_stages)]
        self._kv = [
            [[rng.getrandbits(32) for _ in range(block_tokens)] for _ in range(num_blocks)]
            for _ in range(model.num_layers)
        ]
        self.scores: dict[int, list[int]] = {}  # by sequence, of the step that returned last

    def issue(self, command: RunStep) -> None:
        self._queues[0].append(ToyStep(command, [list(run.tokens) for run in command.runs]))

    @property
    def busy_stages(self) -> list[int]:
        return [stage for stage, queue in enumerate(self._queues) if queue]

    def advance(self, stage: int, fault_in: int | None = None) -> StepReturned | None:
        """Let one stage compute its next step; what leaves the last stage is returned."""
        step = self._queues[stage].popleft()
        # A stage may take the runs of a step in any order.
        order = list(range(len(step.command.runs)))
        self._rng.shuffle(order)
        if fault_in is not None:
            run = step.command.runs[fault_in % len(order)]
            step.faults.setdefault(run.sequence, f"stage {stage} made NaN of it")
        for index in order:
            self._compute(stage, step, index)
        if stage + 1 < len(self._queues):
            self._queues[stage + 1].append(step)
            return None
        tokens = {
            run.sequence: self._model.draw(hidden[-1], run.draw)
            for run, hidden in zip(step.command.runs, step.hidden, strict=True)
            if run.draws and run.sequence not in step.faults
        }
        self.scores = {
            run.sequence: self._scores(run, hidden)
            for run, hidden in zip(step.command.runs, step.hidden, strict=True)
            if run.scoring is not None and run.sequence not in step.faults
        }
        scored = frozenset(self.scores)
        return StepReturned(step.command.step, tokens, step.faults, scored=scored)

    def _scores(self, run: PlannedRun, hidden: Sequence[int]) -> list[int]:
        assert run.scoring is not None and run.scoring.num_rows > 0
        first = run.scoring.first_row
        last = first + run.scoring.num_rows - 1
        assert first >= 0 and last < len(run.tokens)
        assert (run.scoring.next_token is not None) == (last == len(run.tokens) - 1)
        following = [*run.tokens[1:], run.scoring.next_token or 0]
        return [self._model.score(hidden[row], following[row]) for row in range(first, last + 1)]

    def _compute(self, stage: int, step: ToyStep, index: int) -> None:
        run, hidden = step.command.runs[index], step.hidden[index]
        for layer in self._layers[stage]:
            for offset, value in enumerate(hidden):
                position = run.start + offset
                table = self._model.table(run.rope_length, position)
                entry = self._model.kv(layer, position, table, value)
                if run.sequence in step.faults:
                    entry = GARBAGE
                self._place(layer, run, position)[position % self._block_tokens] = entry
            context = [
                self._place(layer, run, position)[position % self._block_tokens]
                for position in range(run.start + len(run.tokens))
            ]
            for offset, value in enumerate(hidden):
                read = context[: run.start + offset + 1]
                hidden[offset] = self._model.attend(layer, value, read)

    def _place(self, layer: int, run: PlannedRun, position: int) -> list[int]:
        return self._kv[layer][run.blocks[position // self._block_tokens]]
