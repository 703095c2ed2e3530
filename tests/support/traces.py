"""Read a trace file as Perfetto would, and ask it who worked when."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANAGER = "manager"


@dataclass
class TraceView:
    """Events by what they say; times in microseconds."""

    tokens: dict[int, int] = field(default_factory=dict)  # of every step
    issued_us: dict[int, float] = field(default_factory=dict)
    returned_us: dict[int, float] = field(default_factory=dict)
    # worker -> lane ("queue", "compute" or "send") -> step -> (from, to)
    lanes: dict[str, dict[str, dict[int, tuple[float, float]]]] = field(default_factory=dict)

    def busy_share(self, worker: str, start_us: float, end_us: float) -> float:
        """The part of an interval in which a worker computed."""
        slices = self.lanes[worker]["compute"].values()
        busy_us = sum(max(0.0, min(end, end_us) - max(start, start_us)) for start, end in slices)
        return busy_us / (end_us - start_us)

    def decode_phase(self, num_sequences: int) -> tuple[float, float]:
        """From the return of the last step with prompt tokens to that of the last step.

        A step with more tokens than there are sequences has prompt tokens in it.
        """
        prefills = [step for step, tokens in self.tokens.items() if tokens > num_sequences]
        return self.returned_us[max(prefills)], max(self.returned_us.values())


def read_trace(path: Path) -> TraceView:
    """Check and read a whole trace."""
    events = json.loads(path.read_text(encoding="utf-8"))
    names = {it["pid"]: it["args"]["name"] for it in events if it["name"] == "process_name"}
    view, begun = TraceView(), dict[tuple[str, str], dict[str, Any]]()
    for event in events:
        assert {"ph", "name", "pid"} <= event.keys(), event
        if event["ph"] != "M":
            assert event["ts"] >= 0, event
        name = names[event["pid"]]
        match event["ph"]:
            case "b":
                begun[event["cat"], event["id"]] = event
            case "e":
                _add(view, name, begun.pop((event["cat"], event["id"])), event)
            case "X":
                assert event["dur"] >= 0, event
                _lane(view, name, "compute")[event["args"]["step"]] = (
                    event["ts"],
                    event["ts"] + event["dur"],
                )
            case other:
                assert other in ("M", "C"), event
    assert not begun, f"spans without an end: {list(begun)}"
    return view


def _add(view: TraceView, name: str, begin: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    step = int(begin["id"].rpartition(".")[2])
    assert end["ts"] >= begin["ts"]
    if name == MANAGER:
        view.tokens[step] = begin["args"]["tokens"]
        view.issued_us[step], view.returned_us[step] = begin["ts"], end["ts"]
    else:
        _lane(view, name, begin["name"])[step] = (begin["ts"], end["ts"])


def _lane(view: TraceView, name: str, lane: str) -> dict[int, tuple[float, float]]:
    return view.lanes.setdefault(name.removeprefix("worker "), {}).setdefault(lane, {})
