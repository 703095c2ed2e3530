"""The folder of one run: what lies where in it, and whether it may be written to.

    SAVE_DIR/
      run.json          settings, model, data and state of the run
      metrics.jsonl     an object an event;  train.log: the same for people
      tensorboard/      the same for TensorBoard
      checkpoints/      step-00000100, ...: all that a run needs to go on
      lora_adapters/    the result: adapter, tokenizer
      merged_model/     the result: an ordinary checkpoint
      loss.png, report.md
      ranks/            what processes beside the first one wrote, where there are several
      launch/           what a launcher of several processes was given, and what it printed

The same for LoRA, SFT and AxoNN. Knows names; what is in the files is others' business.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.jobs.folders import LOCK, PARTIAL, REPLACED, locked, sweep, translated, write_file
from engine.jobs.settings import OutputSettings
from proto.errors import UsageError

OWN_NAMES: Final = (
    "run.json",
    "metrics.jsonl",
    "train.log",
    "tensorboard",
    "checkpoints",
    "lora_adapters",
    "merged_model",
    "loss.png",
    "report.md",
    "ranks",
)
# Written before the run begins, and no run by itself.
LAUNCH: Final = "launch"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's files."""

    path: Path

    @property
    def run_file(self) -> Path:
        """What the run is."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """An object a line."""
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What was said."""
        return self.path / "train.log"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        """The adapter, as peft saves one."""
        return self.path / "lora_adapters"

    @property
    def merged(self) -> Path:
        """The model with the adapter added to its weights."""
        return self.path / "merged_model"

    @property
    def curve(self) -> Path:
        """Losses as a picture."""
        return self.path / "loss.png"

    @property
    def report(self) -> Path:
        """How it went, for people."""
        return self.path / "report.md"

    @property
    def rank_logs(self) -> Path:
        """What processes beside the first one wrote."""
        return self.path / "ranks"

    def read(self) -> dict[str, Any] | None:
        """What run.json says; None without one.

        Raises:
            UsageError: it is damaged.
        """
        try:
            said = json.loads(self.run_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise UsageError(
                f"{self.run_file} cannot be read ({exc}): pass --overwrite to begin anew."
            ) from exc
        if not isinstance(said, dict):
            raise UsageError(f"{self.run_file} is damaged: pass --overwrite to begin anew.")
        return said

    def write(self, said: Mapping[str, Any]) -> None:
        """Replace run.json."""
        write_file(self.run_file, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def open_run_folder(settings: OutputSettings) -> Iterator[RunFolder]:
    """The folder, made or checked, and kept to this run within the block.

    Raises:
        UsageError: it is not empty, and neither to be resumed nor to be overwritten; or another
            run writes to it.
        Error: it cannot be made.
    """
    path = Path(settings.save_dir).expanduser().resolve()
    check_run_folder(settings)
    with translated(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if settings.overwrite:
            _remove_own(path)
        sweep(path)
        yield RunFolder(path)


def check_run_folder(settings: OutputSettings) -> None:
    """What can be refused before anything is loaded; changes nothing.

    Raises:
        UsageError: as `open_run_folder`.
    """
    path = Path(settings.save_dir).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise UsageError(f"--save-dir {path} is a file: name a folder.")
    present = [it.name for it in path.iterdir()] if path.is_dir() else []
    temporary = (LOCK, PARTIAL, REPLACED)
    present = [it for it in present if it != LAUNCH and not it.startswith(temporary)]
    if not present:
        return
    if not (settings.resume or settings.overwrite):
        raise UsageError(
            f"--save-dir {path} is not empty: pass --resume to go on with the run in it, "
            "--overwrite to begin anew, or name another folder."
        )
    if settings.resume and "run.json" not in present:
        raise UsageError(
            f"--resume: {path} holds no run of this command (there is no run.json in it): name "
            "another --save-dir."
        )
    foreign = sorted(set(present) - set(OWN_NAMES))
    if settings.overwrite and not set(present) & set(OWN_NAMES) and foreign:
        raise UsageError(
            f"--overwrite removes an earlier run, and {path} holds none, but {foreign[0]!r}: name "
            "another --save-dir."
        )


def _remove_own(path: Path) -> None:
    """An earlier run's files, and nothing else that lies there."""
    with translated(path):
        for name in OWN_NAMES:
            target = path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)
