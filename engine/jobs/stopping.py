"""Hear that the run is to end: SIGTERM, Ctrl-C, and SIGUSR1, which Slurm can send ahead of time.

The first signal is remembered, and the run leaves at the next place where it can go on later; a
second one ends the process at once. Knows no training.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from proto.errors import Error

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether somebody asked for the end, and how."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @property
    def is_made(self) -> bool:
        """Whether a signal came."""
        return self.signal_number is not None

    def leave_if_made(self, what: str) -> None:
        """Between the parts of a job, where nothing has to be kept.

        Raises:
            Stopped: a signal came; says `what` was not reached.
        """
        if self.signal_number is not None:
            raise Stopped(f"stopped before {what}", self.signal_number)


class Stopped(Error):
    """The run ended early because it was asked to; what it has done is kept."""

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.signal_number = signal_number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listen for signals within the block; in another thread than the main one, for none."""
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if request.is_made:
            os._exit(128 + number)  # asked twice: the last checkpoint is whole on disk
        request.signal_number = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
