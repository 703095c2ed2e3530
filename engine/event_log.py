"""The log of a scheduler's events: enough to have it decide the same again, whatever happened.

A log is lines of JSON. The first says how the scheduler was set up, each other one is an event with
a digest of the commands that came of it. Knows the words of the scheduler and their form in JSON;
opens no file. A log holds the token ids of prompts and texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, Final

import msgspec

from engine.requests import (
    Cancelled,
    Command,
    Event,
    StepReturned,
    Stopped,
    Submitted,
    TopologyLost,
    TopologyRestored,
)
from engine.scheduler import Scheduler
from proto.errors import UsageError

FORM: Final = "comboio scheduler events 1"

EVENTS: Final[dict[str, type[Event]]] = {
    kind.__name__: kind
    for kind in (Submitted, Cancelled, Stopped, StepReturned, TopologyLost, TopologyRestored)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSetUp:
    """What a scheduler was made with."""

    num_stages: int
    num_blocks: int
    block_tokens: int
    max_context: int
    token_budget: int
    rope_switch: int | None

    def scheduler(self) -> Scheduler:
        """One that knows nothing yet."""
        return Scheduler(
            self.num_stages,
            self.num_blocks,
            self.block_tokens,
            max_context=self.max_context,
            token_budget=self.token_budget,
            rope_switch=self.rope_switch,
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """One event of a log, and what the scheduler says to it now."""

    line: int
    event: Event
    commands: tuple[Command, ...]
    is_same: bool  # as it said then


def header(set_up: SchedulerSetUp) -> str:
    """The first line."""
    return json.dumps({"form": FORM, **asdict(set_up)})


def event_line(event: Event, commands: Sequence[Command]) -> str:
    """The line of one event."""
    values: dict[str, Any] = msgspec.to_builtins(event)
    return json.dumps(
        {"event": type(event).__name__, **values, "commands": digest(commands)},
        separators=(",", ":"),
    )


def digest(commands: Sequence[Command]) -> str:
    """The same for the same commands; how many they are stands before it."""
    text = "\n".join(map(repr, commands)).encode("utf-8")
    return f"{len(commands)}:{blake2b(text, digest_size=8).hexdigest()}"


def replay(lines: Iterable[str]) -> Iterator[Replayed]:
    """Feed a log to a new scheduler, event by event; its invariants are checked after each.

    Raises:
        UsageError: a line is none of such a log; says which. A last line that ends early is left
            out, as whoever wrote it was killed.
    """
    numbered = enumerate(lines, 1)
    scheduler = _read_header(next(numbered, (1, ""))[1]).scheduler()
    for number, line in numbered:
        if not line.endswith("\n"):
            return
        event, said = _read_event(number, line)
        commands = tuple(scheduler.handle(event))
        scheduler.check_invariants()
        yield Replayed(number, event, commands, digest(commands) == said)


def _read_header(line: str) -> SchedulerSetUp:
    try:
        values = _object(line)
        if values.pop("form") != FORM:
            raise ValueError
        return msgspec.convert(values, SchedulerSetUp)
    except (ValueError, KeyError, msgspec.ValidationError) as exc:
        raise UsageError(
            f"line 1 does not begin a log of scheduler events ({FORM!r}): was it written with "
            "--event-log?"
        ) from exc


def _read_event(number: int, line: str) -> tuple[Event, str]:
    try:
        values = _object(line)
        kind, said = EVENTS[values.pop("event")], str(values.pop("commands"))
        # Numbers of sequences are keys in some events, and keys of JSON are texts.
        return msgspec.convert(values, kind, strict=False), said
    except (ValueError, KeyError, msgspec.ValidationError) as exc:
        raise UsageError(f"line {number} is no event of a scheduler: {line[:60]!r}") from exc


def _object(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError
    return values
