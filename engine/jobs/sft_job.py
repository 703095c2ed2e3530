"""What every process of one SFT run is told: a JSON file, the same for all of a machine.

Written by the command, read by the processes that a launcher starts; nothing secret in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.jobs.settings import JobSettings
from proto.errors import UsageError

MIXED_PRECISIONS: Final = ("no", "bf16", "fp16")


@dataclass(frozen=True, slots=True, kw_only=True)
class SftJob:
    """One run, as a process of it sees it."""

    settings: JobSettings
    num_processes: int  # on all machines together
    on_cpu: bool
    mixed_precision: str  # one of MIXED_PRECISIONS
    timeout_s: float  # until processes that hear nothing of one another give up

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": self.settings.to_json(),
            "num_processes": self.num_processes,
            "on_cpu": self.on_cpu,
            "mixed_precision": self.mixed_precision,
            "timeout_s": self.timeout_s,
        }


def read_job(path: Path) -> SftJob:
    """The job that a command wrote.

    Raises:
        UsageError: this machine does not see it, or another release wrote it.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return SftJob(**{**said, "settings": JobSettings.from_json(said["settings"])})
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise UsageError(f"{path} cannot be used ({exc}): start the run again.") from exc
