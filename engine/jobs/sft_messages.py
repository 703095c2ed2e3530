"""What launched processes tell the command that started them: a JSON object a line. Pure.

The lines share the launcher's standard output with whatever else is printed there; what is no
message of ours is left to whoever reads them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Final

from engine.jobs.events import (
    EpochEnded,
    Event,
    Finished,
    Memory,
    Saved,
    Started,
    Stepped,
    Validated,
)

TAG: Final = "comboio"
# Of one write to a pipe that no other process's write can be mixed with, on every system; the
# rest of a line is names and numbers.
MAX_TEXT: Final = 3000
EVENTS: Final = {it.kind: it for it in (Started, Stepped, Validated, EpochEnded, Saved, Finished)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A process has begun; before it has loaded anything."""

    rank: int
    pid: int
    host: str
    log_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """This is going on, until something else is."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A line that stays."""

    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """An event of the training."""

    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A process gives up."""

    rank: int
    sentence: str
    exit_code: int
    lost_others: bool = False  # it was well itself: the connection to the others broke


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A process ends early because it was asked to."""

    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The first process is through; where everything is."""

    result: dict[str, Any]


Message = Hello | Busy | Said | Happened | Failed | Left | Done
_KINDS: Final = {it.__name__: it for it in (Hello, Busy, Said, Failed, Left, Done)}


def encode(message: Message) -> str:
    """One line, with its end."""
    if isinstance(message, Happened):
        said: dict[str, Any] = {TAG: "Happened", **message.event.to_json()}
    else:
        said = {TAG: type(message).__name__, **asdict(message)}
    short = {
        key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in said.items()
    }
    return json.dumps(short) + "\n"


def decode(line: str) -> Message | None:
    """The message of a line; None for anything else that was printed."""
    if not line.startswith(f'{{"{TAG}"'):
        return None
    try:
        said = json.loads(line)
        kind = said.pop(TAG)
        if kind == "Happened":
            return Happened(event=_event(said))
        return _KINDS[kind](**said)
    except (ValueError, KeyError, TypeError):
        return None


def _event(said: dict[str, Any]) -> Event:
    kind = EVENTS[said.pop("event")]
    if "memory" in said:
        said["memory"] = Memory(**said["memory"])
    return kind(**said)
