"""Write down what happens in a run: metrics.jsonl, train.log, and TensorBoard's files.

Hears of events and knows nothing of who makes them, so that LoRA, SFT and AxoNN leave the same
files. Every line is on its way to the disk when the event is over. A run that goes on forgets what
was written after its checkpoint: those steps come again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TextIO

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
from engine.jobs.folders import translated, write_file
from engine.jobs.run_folder import RunFolder
from engine.jobs.settings import JobSettings
from proto.errors import Error

MB: Final = 10**6


class RunLog:
    """The files of one run that grow while it trains. A context manager; call it with events."""

    def __init__(
        self,
        folder: RunFolder,
        *,
        log_file: Path | None,
        log_steps: int,
        memory_steps: int,
        with_tensorboard: bool,
        resumed_step: int | None,
    ) -> None:
        """Open the files.

        Args:
            log_file: where lines for people go; None: train.log in the folder.
            resumed_step: the step that the run goes on from; None for a new run.
        Raises:
            Error: a file cannot be written.
        """
        self._folder = folder
        self._lines = LineWriter(log_steps, memory_steps)
        metrics = folder.metrics
        if resumed_step is not None:
            forget_after(metrics, resumed_step)
        elif metrics.exists():
            metrics.unlink()
        with translated(metrics):
            self._metrics = metrics.open("a", encoding="utf-8")
        path = log_file or folder.log
        try:
            with translated(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._log = path.open("a", encoding="utf-8", buffering=1)
        except Error:
            self._metrics.close()
            raise
        self._board = _open_board(folder.tensorboard, resumed_step) if with_tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._metrics, self._log, self._board):
            try:
                if file is not None:
                    with translated(self._folder.path):
                        file.close()
            except Error:
                if error is None:  # else the first one says it
                    raise

    def __call__(self, event: Event) -> None:
        """Write one event.

        Raises:
            Error: a file cannot be written any more.
        """
        with translated(Path(self._metrics.name)):
            _write_line(self._metrics, json.dumps({**event.to_json(), "time": time.time()}))
        for line in self._lines.of(event):
            self.say(line)
        if self._board is not None:
            with translated(self._folder.tensorboard):
                for tag, value in _scalars(event).items():
                    self._board.add_scalar(tag, value, event.step)
                if not isinstance(event, Stepped):
                    self._board.flush()

    def say(self, line: str) -> None:
        """A line for people, with the time."""
        with translated(Path(self._log.name)):
            _write_line(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


def open_log(folder: RunFolder, settings: JobSettings, resumed_step: int | None) -> RunLog:
    """The run's log, as the settings want it."""
    training, output = settings.training, settings.output
    return RunLog(
        folder,
        log_file=Path(output.log_file).expanduser() if output.log_file else None,
        log_steps=training.log_steps,
        memory_steps=training.memory_steps or training.log_steps,
        with_tensorboard=output.tensorboard,
        resumed_step=resumed_step,
    )


def both(
    first: Callable[[Event], None], second: Callable[[Event], None]
) -> Callable[[Event], None]:
    """Two listeners as one; who writes files comes first."""

    def tell(event: Event) -> None:
        first(event)
        second(event)

    return tell


class LineWriter:
    """Events as lines for people, some of them only every so many steps."""

    def __init__(self, log_steps: int, memory_steps: int) -> None:
        self._log_steps, self._memory_steps = log_steps, memory_steps
        self._total_steps = 0

    def of(self, event: Event) -> Sequence[str]:
        """The lines of one event; often none."""
        if isinstance(event, Started):
            self._total_steps = event.total_steps
        if not isinstance(event, Stepped):
            return [describe(event)]
        lines = []
        is_edge = event.step in (1, self._total_steps)
        if event.step % self._log_steps == 0 or is_edge:
            lines.append(describe(event, self._total_steps))
        if event.step % self._memory_steps == 0 or is_edge:
            lines.append(describe_memory(event.step, event.memory))
        return lines


def describe(event: Event, total_steps: int = 0) -> str:
    """One event in one line."""
    match event:
        case Started():
            share = 100 * event.trainable / max(event.weights, 1)
            verb = f"goes on after step {event.step}" if event.is_resumed else "begins"
            return (
                f"training {verb}: {event.rows} rows, {event.total_steps} steps of "
                f"{event.step_rows} rows, {event.steps_per_epoch} an epoch; "
                f"{event.trainable:,} of {event.weights:,} weights learn ({share:.3g} %); "
                f"{event.processes} x {event.device} in {event.dtype}"
            )
        case Stepped():
            norm = "" if event.grad_norm is None else f", gradient {event.grad_norm:.3g}"
            return (
                f"step {event.step}/{total_steps}, epoch {event.epoch:.2f}: loss {event.loss:.4f}"
                f"{norm}, learning rate {event.learning_rate:.3g}, "
                f"{event.tokens_per_s:.0f} tokens/s, {event.samples_per_s:.1f} samples/s"
            )
        case Validated():
            return (
                f"validation after step {event.step}: loss {event.loss:.4f}, perplexity "
                f"{event.perplexity:.2f} over {event.tokens} tokens, {event.seconds:.1f} s"
            )
        case EpochEnded():
            return f"epoch {event.epoch} took {event.seconds:.1f} s"
        case Saved():
            return f"checkpoint {event.path} ({event.seconds:.2f} s)"
        case Finished():
            return f"{event.step} steps done in {event.seconds:.1f} s"
        case _:
            return f"{event.kind} at step {event.step}"


def describe_memory(step: int, memory: Memory) -> str:
    """The memory line, of processor and GPU."""
    line = (
        f"[memory] step {step}: CPU {memory.rss_bytes / MB:.1f} MB "
        f"(peak {memory.peak_rss_bytes / MB:.1f} MB)"
    )
    if memory.gpu_bytes is None:
        return f"{line}, no GPU"
    line += (
        f", GPU {memory.gpu_bytes / MB:.1f} MB allocated "
        f"(peak {(memory.peak_gpu_bytes or 0) / MB:.1f} MB), "
        f"{(memory.gpu_reserved_bytes or 0) / MB:.1f} MB reserved"
    )
    return line if memory.gpu_busy is None else f"{line}, GPU {100 * memory.gpu_busy:.0f} % busy"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events so far; a last line that was cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def forget_after(path: Path, step: int) -> None:
    """Drop events of later steps, and the end of a run that is to go on.

    Raises:
        Error: the file cannot be written.
    """
    kept = [
        it for it in read_metrics(path) if it.get("step", 0) <= step and it.get("event") != "end"
    ]
    write_file(path, "".join(f"{json.dumps(it)}\n" for it in kept))


def _write_line(file: TextIO, line: str) -> None:
    file.write(f"{line}\n")
    file.flush()


def _open_board(folder: Path, resumed_step: int | None) -> Any | None:
    """TensorBoard's writer; None where it is not installed, without which a run goes well."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    purge = None if resumed_step is None else resumed_step + 1
    with translated(folder):
        board: Any = SummaryWriter  # without annotations
        return board(str(folder), purge_step=purge)


def _scalars(event: Event) -> dict[str, float]:
    match event:
        case Stepped():
            memory = event.memory
            said = {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "speed/tokens_per_s": event.tokens_per_s,
                "speed/samples_per_s": event.samples_per_s,
                "memory/cpu_bytes": memory.rss_bytes,
                "memory/gpu_bytes": memory.gpu_bytes,
                "memory/gpu_busy": memory.gpu_busy,
            }
            return {name: value for name, value in said.items() if value is not None}
        case Validated():
            return {"validation/loss": event.loss, "validation/perplexity": event.perplexity}
        case EpochEnded():
            return {"speed/epoch_seconds": event.seconds}
        case _:
            return {}
