"""Fine-tune by LoRA on AxoNN's sharded layers: several processes, tensor x data parallel.

Every process runs this, in the same order. The first one alone writes files: what is in the run's
folder afterwards is what `engine.jobs.lora` leaves. Which processes there are, and how they found
one another, is others' business (`engine.jobs.axonn_team`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from engine.jobs.attention_check import check_packing
from engine.jobs.axonn_cpu import LOUD
from engine.jobs.axonn_grid import Grid, Parallelism, make_grid
from engine.jobs.axonn_layers import Shards, shard
from engine.jobs.axonn_library import check_version, start_axonn
from engine.jobs.axonn_placement import place, wait_for_all, wait_for_room
from engine.jobs.axonn_ranks import AxonnRanks
from engine.jobs.axonn_team import Team
from engine.jobs.base_model import Placement, load_base
from engine.jobs.checkpoints import latest_checkpoint
from engine.jobs.events import Event, Listener, Started
from engine.jobs.job import (
    Materials,
    Result,
    Watcher,
    begin,
    conclude,
    describe_run,
    gather,
)
from engine.jobs.lora import finish_again, say_targets
from engine.jobs.lora_config import adapt, find_targets, trainable_parameters
from engine.jobs.run_folder import RunFolder, open_run_folder
from engine.jobs.run_log import both, open_log
from engine.jobs.saving import save_adapter
from engine.jobs.settings import JobSettings
from engine.jobs.stopping import StopRequest
from engine.jobs.training_loop import Trainee, train
from proto.errors import Error, UsageError

PARALLELISM: Final = "parallelism"  # in run.json


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What every part of a run needs."""

    settings: JobSettings
    grid: Grid
    team: Team
    placement: Placement  # where it trains
    materials: Materials
    watcher: Watcher
    stop: StopRequest


def run_axonn(
    settings: JobSettings,
    parallelism: Parallelism,
    team: Team,
    watcher: Watcher,
    stop: StopRequest,
) -> Result | None:
    """Train, save, merge, report.

    Returns:
        What there is now, to the first process; None to the others.
    Raises:
        UsageError, ModelError, DataError: what was asked for cannot be done; nothing was changed.
        Stopped: a signal came; a checkpoint holds what is done.
        Error: memory or disk ran out, or the training diverged; the last checkpoint is whole.
    """
    check_version()
    grid = make_grid(parallelism, team.num_ranks, team.launcher)
    check_settings(settings)
    placement = place(settings.training, team, stop)
    materials = _gather_in_turn(settings, team, watcher, stop)
    job = _Job(
        settings=settings,
        grid=grid,
        team=team,
        placement=placement,
        materials=materials,
        watcher=watcher,
        stop=stop,
    )
    watcher.say(f"{team.sentence}; {grid.sentence}")
    if placement.device.type == "cpu":
        watcher.say(LOUD)
    if team.is_first:
        return _lead(job)
    _follow(job)
    return None


def check_settings(settings: JobSettings) -> None:
    """What LoRA can do in one process, and not on shards.

    Raises:
        UsageError: it was asked for.
    """
    if settings.lora.dora:
        raise UsageError(
            "--dora needs whole base weights on each rank, and AxoNN shards them: leave it out, or "
            "use manager finetune lora or sft."
        )
    if settings.training.quantize != "none":
        raise UsageError(
            f"--quantize {settings.training.quantize}: AxoNN shards no quantized weights; leave it "
            "out, or use manager finetune lora or sft."
        )


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


def _lead(job: _Job) -> Result:
    """Open the folder, tell the others where to begin, train with them, save."""
    team, settings, watcher = job.team, job.settings, job.watcher
    with open_run_folder(settings.output) as folder, _trace_of_begun_runs_only(folder):
        _check_same_grid(folder, job.grid)
        is_over = begin(folder, settings, job.materials, team.num_ranks)
        latest = latest_checkpoint(folder.checkpoints)
        team.on_folder(folder.path)
        team.tell("begin", [is_over, str(folder.path), latest and latest.name])
        if is_over:
            return finish_again(folder, settings, job.materials, watcher)
        held = [_train(job, folder, latest)]
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


def _check_same_grid(folder: RunFolder, grid: Grid) -> None:
    before = (folder.read() or {}).get(PARALLELISM)
    if before is not None and before != grid.to_json():
        try:
            was = Grid(**before).sentence
        except TypeError:
            was = str(before)
        raise UsageError(
            f"--resume: the run in {folder.path} was started with {was}, and this is "
            f"{grid.sentence}: start it with the same, or pass --overwrite to begin anew."
        )


# --- the others --------------------------------------------------------------------------------


def _follow(job: _Job) -> None:
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
        _train(job, folder, folder.checkpoints / name if name else None)


# --- all of them -------------------------------------------------------------------------------


def _train(job: _Job, folder: RunFolder, latest: Path | None) -> Any:
    """All steps, from a checkpoint on if there is one; the model that has learnt, in shards."""
    watcher, team, settings = job.watcher, job.team, job.settings
    with _process_group(team, job.placement):
        start_axonn(job.grid, job.placement.device)
        # Sharded on the CPU: a GPU may have no room for the whole.
        on_cpu = replace(job.placement, device=torch.device("cpu"))
        wait_for_room(team, job.materials.checkpoint, on_cpu, watcher, job.stop)
        watcher.busy(f"loading {job.materials.checkpoint.name}")
        base = load_base(job.materials.checkpoint, on_cpu)
        targets = find_targets(base, settings.lora.target_modules)
        model = adapt(base, settings.lora, settings.training.seed)
        say_targets(targets, watcher)
        said = describe_run(
            settings,
            job.materials,
            model=model,
            targets=targets,
            placement=job.placement,
            processes=team.num_ranks,
        )
        shards = shard(model, job.grid)
        for sentence in shards.sentences(job.grid):
            watcher.say(sentence)
        job.stop.leave_if_made("training began")
        if team.is_first:
            folder.write(said | {PARALLELISM: job.grid.to_json()})
        model.to(job.placement.device)
        if settings.training.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        wait_for_all(team, job.stop)
        ranks = AxonnRanks(job.placement.device)
        ranks.share_weights([it for _, it in trainable_parameters(model)])
        if settings.data.packing:
            check_packing(model, job.placement, job.materials.sizes.vocab_size)
        with _listener(job, folder, latest, shards) as listener:
            train(
                Trainee(
                    model=model,
                    placement=job.placement,
                    settings=settings.training,
                    train=job.materials.dataset.train,
                    validation=job.materials.dataset.validation,
                    checkpoints=folder.checkpoints,
                    listener=listener,
                    stop=job.stop,
                    ranks=ranks,
                ),
                resume_from=latest,
            )
    return model


@contextmanager
def _process_group(team: Team, placement: Placement) -> Iterator[None]:
    """torch.distributed, before AxoNN: it then takes ranks from there."""
    stores: Any = dist  # whose names are not all declared
    dist.init_process_group(
        "nccl" if placement.device.type == "cuda" else "gloo",
        store=stores.PrefixStore("group", team.store),
        rank=team.rank,
        world_size=team.num_ranks,
    )
    yield
    # Not after an error: the others may be in the middle of something, and this one ends anyway.
    dist.destroy_process_group()


@contextmanager
def _listener(
    job: _Job, folder: RunFolder, latest: Path | None, shards: Shards
) -> Iterator[Listener]:
    """Files and the command line for the first process, nobody for the others."""
    if not job.team.is_first:
        yield lambda _: None
        return
    resumed_step = int(latest.name.removeprefix("step-")) if latest is not None else None
    with open_log(folder, job.settings, resumed_step) as log:
        for sentence in (
            *job.materials.dataset.summary.sentences(),
            f"{job.team.sentence}; {job.grid.sentence}",
            *((LOUD,) if job.placement.device.type == "cpu" else ()),
            *shards.sentences(job.grid),
        ):
            log.say(sentence)

        def tell(event: Event) -> None:
            if isinstance(event, Started):  # of the model, not of this process's part
                event = replace(event, weights=shards.total_weights)
            both(log, job.watcher.event)(event)

        yield tell
