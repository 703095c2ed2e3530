"""Fine-tune with trl's SFTTrainer in one process, or as one of several that a launcher started.

Reads like what happens in each of them. The first process alone writes files; all of them read the
same data and learn from different rows of it. What is not peculiar to trl stands in
`engine.jobs.job`.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from engine.jobs.base_model import Placement, choose_placement, load_base
from engine.jobs.checkpoints import latest_checkpoint
from engine.jobs.events import Listener
from engine.jobs.folders import PARTIAL
from engine.jobs.job import (
    Materials,
    Result,
    Watcher,
    begin,
    conclude_saved,
    describe_run,
    finish_again,
    gather,
)
from engine.jobs.lora import adapted, say_targets
from engine.jobs.lora_config import find_targets, trainable_parameters
from engine.jobs.optimizer import new_optimizer
from engine.jobs.process_group import ProcessGroup
from engine.jobs.run_folder import RunFolder, open_run_folder
from engine.jobs.run_log import both, open_log
from engine.jobs.saving import save_adapter
from engine.jobs.sft_job import SftJob
from engine.jobs.step_book import Trainee
from engine.jobs.stopping import StopRequest
from proto.errors import Error, UsageError


def run_sft(job: SftJob, watcher: Watcher, stop: StopRequest) -> Result | None:
    """Train together with the other processes; the first one saves, merges and reports.

    Returns:
        The result in the first process, None in the others.
    Raises:
        UsageError, ModelError, DataError: what was asked for cannot be done; nothing was changed.
        Stopped: a signal came to one of the processes; a checkpoint holds what is done.
        Error: fewer processes than asked for; or as `engine.jobs.lora.run_lora`.
    """
    group = join(job)
    if group.rank == 0:
        return _lead(job, group, watcher, stop)
    _follow(job, group, watcher, stop)
    return None


def join(job: SftJob) -> ProcessGroup:
    """Meet the other processes, and make sure that they are all there.

    Raises:
        Error: there are not as many as were asked for.
    """
    from accelerate import PartialState

    state: Any = PartialState  # without annotations
    found = state(cpu=job.on_cpu, timeout=timedelta(seconds=job.timeout_s))
    device = torch.device("cpu") if job.on_cpu else torch.device("cuda", _local_rank())
    if found.num_processes != job.num_processes:
        raise Error(
            f"{found.num_processes} of {job.num_processes} processes train together here: each "
            "part would learn alone; see what the launcher printed, and that all machines were "
            "given the same --num-processes."
        )
    return ProcessGroup(device)


def _lead(job: SftJob, group: ProcessGroup, watcher: Watcher, stop: StopRequest) -> Result | None:
    """The first process."""
    settings = job.settings
    placement, materials = _prepare(job, group, watcher, stop)
    with open_run_folder(settings.output) as folder:
        is_over = begin(folder, settings, materials, group.num_processes)
        group.first_says(float(is_over))
        if is_over:
            group.leave()
            result = finish_again(folder, settings, materials, watcher)
            group.first_is_through()
            return result
        watcher.busy(f"loading {materials.checkpoint.name}")
        base = load_base(materials.checkpoint, placement)
        targets = find_targets(base, settings.lora.target_modules)
        model = adapted(base, settings, placement, materials)
        say_targets(targets, watcher)
        folder.write(
            describe_run(
                settings,
                materials,
                model=model,
                targets=targets,
                placement=placement,
                processes=group.num_processes,
            )
        )
        latest = latest_checkpoint(folder.checkpoints)
        with open_log(folder, settings, _step_of(latest)) as log:
            for sentence in materials.dataset.summary.sentences():
                log.say(sentence)
            _train(
                job, model, group, placement, materials, folder, latest, stop,
                both(log, watcher.event),
            )  # fmt: skip
        watcher.busy("saving the adapter")
        save_adapter(model, materials.checkpoint, folder.adapters)
        group.barrier()
        group.leave()
        del base, model
        result = conclude_saved(folder, settings, materials.checkpoint, watcher)
        group.first_is_through()
        return result


def _follow(job: SftJob, group: ProcessGroup, watcher: Watcher, stop: StopRequest) -> None:
    """Any other process."""
    settings = job.settings
    placement, materials = _prepare(job, group, watcher, stop)
    if group.first_says(0.0):
        group.leave()
        group.wait_for_first()
        return
    base = load_base(materials.checkpoint, placement)
    model = adapted(base, settings, placement, materials)
    folder = RunFolder(Path(settings.output.save_dir).expanduser().resolve())
    _train(job, model, group, placement, materials, folder, None, stop, lambda _: None)
    group.barrier()  # until the adapter is saved
    group.leave()
    del base, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    group.wait_for_first()


def _prepare(
    job: SftJob, group: ProcessGroup, watcher: Watcher, stop: StopRequest
) -> tuple[Placement, Materials]:
    """What every process needs before a weight is read.

    Raises:
        UsageError: they did not read the same; or as `engine.jobs.job.gather`.
    """
    settings = job.settings
    own = settings.training
    if not job.on_cpu:
        own = replace(own, device=f"cuda:{_local_rank()}")
        torch.cuda.set_device(_local_rank())
    placement = choose_placement(own)
    materials = gather(settings, watcher, stop)
    if materials.tokenizer is None:
        raise UsageError(
            f"{materials.checkpoint.name} has no tokenizer, and trl wants one: put its files "
            "there, or take `manager finetune lora`, which trains on token ids as well."
        )
    digest = materials.dataset.train.digest
    if group.sum([float(group.agree(digest))])[0] < group.num_processes:
        raise UsageError(
            "the processes of this run read different training data: name files that all machines "
            "see under the same path with the same content."
        )
    return placement, materials


def _train(
    job: SftJob,
    model: Any,
    group: ProcessGroup,
    placement: Placement,
    materials: Materials,
    folder: RunFolder,
    latest: Path | None,
    stop: StopRequest,
    listener: Listener,
) -> None:
    """All steps, from the first process's last checkpoint on if there is one."""
    from engine.jobs.sft_steps import Steps
    from engine.jobs.sft_trainer import RowsTrainer

    training, rows = job.settings.training, materials.dataset.train
    optimizer = new_optimizer(training, [it for _, it in trainable_parameters(model)])
    trainee = Trainee(
        model=model,
        settings=training,
        placement=placement,
        train=rows,
        validation=materials.dataset.validation,
        checkpoints=folder.checkpoints,
        listener=listener,
        stop=stop,
        ranks=group,
    )
    steps = Steps(trainee, optimizer)
    book = steps.book
    path = _agreed(folder, latest, group)
    if path is not None:
        book.resume(path)
    trainer = RowsTrainer(
        model=model,
        job=job,
        plan=book.plan,
        rows=rows,
        tokenizer=materials.tokenizer,
        placement=placement,
        ranks=group,
        optimizer=optimizer,
        callback=steps,
        scratch=folder.path / f"{PARTIAL}trainer{group.rank}",  # swept if this process is killed
    )
    try:
        steps.trainer = trainer
        trainer.check_loss(materials.checkpoint.name)
        book.scaler = trainer.accelerator.scaler
        book.restore_scale()
        book.begin()
        if not book.is_over:
            trainer.go_on(book.step)
        steps.finish()
    finally:
        steps.trainer = None
        trainer.close()
        model.eval()


def _agreed(folder: RunFolder, latest: Path | None, group: ProcessGroup) -> Path | None:
    """The checkpoint that the first process goes on from, for everybody."""
    step = int(group.first_says(float(_step_of(latest) or 0)))
    if step == 0:
        return None
    path = folder.checkpoints / f"step-{step:08d}"
    if not path.is_dir():
        raise UsageError(
            f"--save-dir: the checkpoint {path} is not seen from every machine: name a folder on "
            "a file system that all of them share."
        )
    return path


def _step_of(checkpoint: Path | None) -> int | None:
    return None if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
