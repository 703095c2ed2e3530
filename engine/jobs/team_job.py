"""A fine-tuning job of one process or several: the first one leads, all of them train.

Every process runs this, in the same order. The first one alone writes files: what is in the run's
folder afterwards is the same however many there were. What a process holds of the model, and how
the processes exchange gradients, is the method's business (`engine.jobs.lora`,
`engine.jobs.axonn`); which processes there are, their starter's (`engine.jobs.team`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from engine.jobs.base_model import Placement
from engine.jobs.checkpoints import latest_checkpoint
from engine.jobs.events import Event, Listener, Started
from engine.jobs.job import Materials, Result, Watcher, begin, conclude, finish_again, gather
from engine.jobs.ranks import Ranks
from engine.jobs.run_folder import RunFolder, open_run_folder
from engine.jobs.run_log import both, open_log
from engine.jobs.saving import save_adapter
from engine.jobs.settings import JobSettings, TrainingSettings
from engine.jobs.step_book import Trainee
from engine.jobs.stopping import StopRequest
from engine.jobs.team import Team
from engine.jobs.training_loop import train
from proto.errors import Error


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamJob:
    """What every part of a run needs."""

    settings: JobSettings
    team: Team
    placement: Placement  # where it trains
    materials: Materials
    watcher: Watcher
    stop: StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """A model that is ready to learn, with the others'."""

    model: Any
    ranks: Ranks
    said: dict[str, Any]  # what run.json says of the run
    sentences: Sequence[str] = ()  # for the log
    total_weights: int | None = None  # of the whole model; None: this process holds it


class Method(Protocol):
    """What a way of training does its own way."""

    def place(self, training: TrainingSettings, team: Team, stop: StopRequest) -> Placement:
        """Where this process computes."""
        ...

    def sentences(self, team: Team, placement: Placement) -> Sequence[str]:
        """How the work is shared, for people."""
        ...

    def check_folder(self, folder: RunFolder) -> None:
        """Whether a run that was begun there can go on so."""
        ...

    def learner(self, job: TeamJob) -> AbstractContextManager[Learner]:
        """The model with its adapters, and the connection to the others within the block."""
        ...


def run_together(
    method: Method, settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest
) -> Result | None:
    """Train, save, merge, report.

    Returns:
        What there is now, to the first process; None to the others.
    Raises:
        UsageError, ModelError, DataError: what was asked for cannot be done; nothing was changed.
        Stopped: a signal came; a checkpoint holds what is done.
        Error: memory or disk ran out, or the training diverged; the last checkpoint is whole.
    """
    placement = method.place(settings.training, team, stop)
    job = TeamJob(
        settings=settings,
        team=team,
        placement=placement,
        materials=_gather_in_turn(settings, team, watcher, stop),
        watcher=watcher,
        stop=stop,
    )
    for sentence in method.sentences(team, placement):
        watcher.say(sentence)
    if team.is_first:
        return _lead(method, job)
    _follow(method, job)
    return None


def _gather_in_turn(
    settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest
) -> Materials:
    """The first process first: it fills the caches, and says what is wrong with the data."""
    if not team.is_first:
        expected = team.ask("data", stop, "the data was read")
        materials = gather(settings, watcher, stop)
        if _digests(materials) != expected:
            raise Error(
                "the data or the model read here are not those that rank 0 read: put them on a "
                "file system that all nodes share, or the same files on each node"
            )
        return materials
    materials = gather(settings, watcher, stop)
    team.tell("data", _digests(materials))
    return materials


def _digests(materials: Materials) -> list[str]:
    dataset = materials.dataset
    validation = "" if dataset.validation is None else dataset.validation.digest
    return [materials.checkpoint.fingerprint, dataset.train.digest, validation]


# --- the first process -------------------------------------------------------------------------


def _lead(method: Method, job: TeamJob) -> Result:
    """Open the folder, tell the others where to begin, train with them, save."""
    team, settings, watcher = job.team, job.settings, job.watcher
    with open_run_folder(settings.output) as folder, _trace_of_begun_runs_only(folder):
        method.check_folder(folder)
        is_over = begin(folder, settings, job.materials, team.num_ranks)
        latest = latest_checkpoint(folder.checkpoints)
        team.on_folder(folder.path)
        team.tell("begin", [is_over, str(folder.path), latest and latest.name])
        if is_over:
            return finish_again(folder, settings, job.materials, watcher)
        held = [_train(method, job, folder, latest)]
        return conclude(
            folder,
            settings,
            job.materials,
            watcher,
            save_adapters=lambda path: save_adapter(held[0], job.materials.checkpoint, path),
            release=held.clear,
        )


@contextmanager
def _trace_of_begun_runs_only(folder: RunFolder) -> Iterator[None]:
    """A run that is refused leaves the folder as it was, for the next try."""
    try:
        yield
    except BaseException:
        if not folder.run_file.exists():
            shutil.rmtree(folder.rank_logs, ignore_errors=True)
        raise


# --- the others --------------------------------------------------------------------------------


def _follow(method: Method, job: TeamJob) -> None:
    """Train where the first process says."""
    is_over, path, name = job.team.ask("begin", job.stop, "training began")
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise Error(
            f"{path}, where rank 0 writes, is not there on {job.team.hosts[job.team.rank]}: name a "
            "--save-dir on a file system that all nodes share"
        )
    job.team.on_folder(folder.path)
    if not is_over:
        _train(method, job, folder, folder.checkpoints / name if name else None)


# --- all of them -------------------------------------------------------------------------------


def _train(method: Method, job: TeamJob, folder: RunFolder, latest: Path | None) -> Any:
    """All steps, from a checkpoint on if there is one; the model that has learnt."""
    with method.learner(job) as learner:
        if job.team.is_first:
            folder.write(learner.said)
        with _listener(method, job, folder, latest, learner) as listener:
            train(
                Trainee(
                    model=learner.model,
                    placement=job.placement,
                    settings=job.settings.training,
                    train=job.materials.dataset.train,
                    validation=job.materials.dataset.validation,
                    checkpoints=folder.checkpoints,
                    listener=listener,
                    stop=job.stop,
                    ranks=learner.ranks,
                ),
                resume_from=latest,
            )
    return learner.model


@contextmanager
def _listener(
    method: Method, job: TeamJob, folder: RunFolder, latest: Path | None, learner: Learner
) -> Iterator[Listener]:
    """Files and the command line for the first process, nobody for the others."""
    if not job.team.is_first:
        yield lambda _: None
        return
    resumed_step = int(latest.name.removeprefix("step-")) if latest is not None else None
    with open_log(folder, job.settings, resumed_step) as log:
        for sentence in (
            *job.materials.dataset.summary.sentences(),
            *method.sentences(job.team, job.placement),
            *learner.sentences,
        ):
            log.say(sentence)

        def tell(event: Event) -> None:
            if isinstance(event, Started) and learner.total_weights is not None:
                event = replace(event, weights=learner.total_weights)
            both(log, job.watcher.event)(event)

        yield tell
