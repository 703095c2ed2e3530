"""Run one rank of a job: the first one speaks to people, the others to it.

The others' stderr goes to files of their own in the run's folder, once there is one: what torch
and NCCL write there is what explains a death. Knows no method of training.
"""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.jobs.settings import JobSettings
from manager.cli import Interrupted
from manager.finetune.ranks_launch import Launch
from manager.finetune.ranks_meeting import meet
from manager.finetune.ranks_place import Place, find_place
from manager.finetune.ranks_watch import Hub, Spoke, Watch
from manager.finetune.running import run_job
from proto.errors import Error

if TYPE_CHECKING:
    from engine.jobs.events import Event
    from engine.jobs.job import Result, Watcher
    from engine.jobs.stopping import StopRequest
    from engine.jobs.team import Team

    # Loads what it needs when it is called; a result for the first rank, None for the others.
    TeamWork = Callable[[JobSettings, Team, Watcher, StopRequest], Result | None]

EXIT_FAULT: Final = 1
LOOPBACK_INTERFACE: Final = "lo"


def run_rank(
    work: TeamWork,
    settings: JobSettings,
    launch: Launch,
    place: Place | None = None,
    *,
    as_json: bool,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Find the other ranks, and do this one's part.

    Args:
        place: where they meet; None: where the launcher has it.
        check: as `meet`.
    Raises:
        Interrupted, Error: in the first rank, as `run_job`; the others end with its exit code.
    """
    # torch warns of each address without a name in DNS; nodes of a cluster often have none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Before the slow imports, so that a death in one of them is known.
    meeting = meet(launch, place or find_place(launch, os.environ), check)
    from engine.jobs.team import Team

    watch = meeting.watch
    if len(set(watch.hosts)) == 1 and Path("/sys/class/net", LOOPBACK_INTERFACE).exists():
        # gloo would look for an address of the host's name, which may lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    team = Team(
        rank=launch.rank,
        num_ranks=launch.num_ranks,
        local_rank=launch.local_rank,
        hosts=watch.hosts,
        launcher=launch.launcher,
        store=meeting.store,
        on_folder=lambda folder: _keep_logs(folder, watch),
    )
    if isinstance(watch, Spoke):
        _follow(watch, lambda stop: work(settings, team, Silent(), stop))
    else:
        _lead(watch, work, settings, team, as_json=as_json)


def _lead(watch: Hub, work: TeamWork, settings: JobSettings, team: Team, *, as_json: bool) -> None:
    """The first rank, as any other command; whatever ends it ends the others."""

    def job(settings: JobSettings, watcher: Watcher, stop: StopRequest) -> Result:
        result = work(settings, team, watcher, stop)
        assert result is not None  # this is the first rank
        return result

    try:
        run_job(job, settings, as_json=as_json)
    except Interrupted as exc:
        watch.speak(exc.exit_code)
        raise
    except Error as exc:
        watch.speak(exc.exit_code)
        raise
    except Exception:
        watch.wait_for_reason()
        watch.speak(EXIT_FAULT)
        raise
    watch.finish()


def _follow(watch: Spoke, job: Callable[[StopRequest], object]) -> None:
    """Any other rank: says nothing to people, and leaves when the first one does."""
    from engine.jobs.stopping import Stopped, stop_request

    with stop_request() as stop:
        try:
            job(stop)
        except Stopped as exc:
            watch.fail(str(exc), 128 + exc.signal_number)
        except Error as exc:
            watch.fail(str(exc), exc.exit_code)
        except Exception as exc:
            watch.wait_for_reason()
            traceback.print_exc()  # into this rank's log
            watch.fail(f"{type(exc).__name__}: {exc} (a fault in Comboio)", EXIT_FAULT)
        watch.finish()


def _keep_logs(folder: Path, watch: Watch) -> None:
    """From now on each rank but the first has a log of its own."""
    from engine.jobs.run_folder import RunFolder

    logs = RunFolder(folder).rank_logs

    def log_of(rank: int) -> str:
        path = logs / f"rank-{rank:05d}.log"
        return f"its log is {path}" if path.exists() else "what it wrote stands here"

    watch.log_of = log_of
    if watch.me.rank:
        logs.mkdir(exist_ok=True)
        handle = os.open(
            logs / f"rank-{watch.me.rank:05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        os.write(handle, f"{watch.name(watch.me.rank)}, process {watch.me.pid}\n".encode())
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)
    faulthandler.enable()


class Silent:
    """Shows nothing; see `engine.jobs.job.Watcher`."""

    def busy(self, text: str) -> None:
        """Nobody is told."""

    def say(self, line: str) -> None:
        """Nobody is told."""

    def event(self, event: Event) -> None:
        """Nobody is told."""
