"""The words of the scheduler: requests and events go in, commands come out.

Values only. What the events mean stands in `engine.scheduler`; how a command becomes bytes on a
link is the manager's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Reason: TypeAlias = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and where its generation ends."""

    sequence: int  # the caller's number for it; unique among the live ones
    prompt: tuple[int, ...]
    max_new_tokens: int  # 0: only the prompt is scored
    eos: frozenset[int] = frozenset()  # any of these ends the text and is not part of it
    prompt_salt: int | str = 0  # prompts share KV blocks only under the same salt
    scores_prompt: bool = False  # how likely each token of the prompt is, from its second on


# --- events ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request wants to run."""

    request: Request


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for this sequence any more."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """The shell saw a stop text in what this sequence generated."""

    sequence: int


@dataclass(frozen=True, slots=True)
class StepReturned:
    """A step left the last stage. Steps return in the order in which they were issued."""

    step: int
    tokens: dict[int, int]  # by sequence, one for every run that draws and has no fault
    faults: dict[int, str]  # by sequence: why it could not be computed
    stage_s: tuple[float, ...] = ()  # compute seconds, one a stage
    elapsed_s: float = 0.0  # from issue to return, by the shell's clock
    scored: frozenset[int] = frozenset()  # sequences whose runs brought the scores they were to


@dataclass(frozen=True, slots=True)
class TopologyLost:
    """A worker went away: the KV of every sequence is gone, and what is in flight never returns."""


@dataclass(frozen=True, slots=True)
class TopologyRestored:
    """There is a whole chain again, with empty KV."""

    num_blocks: int
    num_stages: int


Event: TypeAlias = Submitted | Cancelled | Stopped | StepReturned | TopologyLost | TopologyRestored


# --- commands --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows of a run that tell how likely the prompt's next tokens are."""

    first_row: int  # within the run
    num_rows: int  # 1 or more
    next_token: int | None  # of the prompt, behind the run's last token, if that row is one of them


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A contiguous stretch of one sequence inside a step."""

    sequence: int
    start: int  # position of the first token
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]  # block table covering positions [0, start + len(tokens))
    rope_length: int  # a token at position p uses the rotary tables of max(rope_length, p + 1)
    draws: bool  # False: more of the prompt follows
    draw: int  # tokens generated before this run: the counter of the sampler's randomness
    state_slot: int | None = None  # None where the model has no state of fixed size
    scoring: ScoredRows | None = None


@dataclass(frozen=True, slots=True)
class RunStep:
    """Send this micro-batch down the chain."""

    step: int
    epoch: int
    runs: tuple[PlannedRun, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(run.tokens) for run in self.runs)


@dataclass(frozen=True, slots=True)
class Generated:
    """This token is part of the sequence's text. Only what is said here counts: a token in
    `StepReturned` may belong to a sequence that is over, or that has to be computed again."""

    sequence: int
    token: int
    draw: int  # its place among the generated tokens, from 0


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores in this `StepReturned` count: of so many tokens of the prompt, from `start` on.
    They come in order, each position once, however often the sequence is computed."""

    sequence: int
    start: int  # position of the first of these tokens
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The sequence is over; it holds nothing any more."""

    sequence: int
    reason: Reason
    detail: str = ""
    eos_token: int | None = None  # the token that ended it, if one did; it has no `Generated`


@dataclass(frozen=True, slots=True)
class Refused:
    """The request can never run."""

    sequence: int
    reason: str


Command: TypeAlias = RunStep | Generated | Scored | Finished | Refused


# --- to look at ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the scheduler holds right now, for progress displays and metrics."""

    epoch: int
    waiting: int
    running: int
    steps_in_flight: int
    decode_groups: int  # micro-batches that the decoding sequences are spread over
    blocks_total: int
    blocks_free: int  # allocatable: never used, or kept only for sharing
    preemptions: int  # since the start
    shared_tokens: int  # prompt tokens that needed no computing, since the start
