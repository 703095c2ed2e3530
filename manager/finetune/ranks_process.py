"""What `manager finetune lora --processes N` starts: one rank beside the first.

It reads one line of JSON from its standard input, and ends when that closes before the ranks met.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Final

from engine.jobs.settings import JobSettings
from manager.cli import say
from manager.finetune.lora import work
from manager.finetune.ranks_here import LAUNCHER
from manager.finetune.ranks_launch import Launch
from manager.finetune.ranks_place import LOOPBACK, Place
from manager.finetune.ranks_running import run_rank
from proto.errors import Error

if TYPE_CHECKING:
    from engine.jobs.job import Result, Watcher
    from engine.jobs.stopping import StopRequest
    from engine.jobs.team import Team

ORPHANED: Final = 3
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main() -> None:
    """Run one rank; ends with the first one's exit code."""
    # Until it trains, the first rank hears them for all.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    said = json.loads(sys.stdin.buffer.readline())
    met = threading.Event()
    _end_with_the_first(met)

    def meet_and_work(
        settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest
    ) -> Result | None:
        met.set()
        return work(settings, team, watcher, stop)

    launch = Launch(
        launcher=LAUNCHER,
        rank=said["rank"],
        num_ranks=said["num_ranks"],
        local_rank=said["rank"],
    )
    place = Place(LOOPBACK, [said["port"]], said["token"])
    settings = JobSettings.from_json(said["settings"])
    try:
        run_rank(meet_and_work, settings, launch, place, as_json=False)
    except Error as exc:
        say(str(exc))
        os._exit(exc.exit_code)


def _end_with_the_first(met: threading.Event) -> None:
    """Its end of our standard input closes when it is gone, killed or not."""

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        if not met.is_set():  # else its connection tells, and somebody says so
            os._exit(ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


if __name__ == "__main__":
    main()
