"""Fine-tune by LoRA in one process: on the CPU, or on one GPU.

Reads like what happens. Everything that SFT and AxoNN share with it stands in `engine.jobs.job`;
the loop in `engine.jobs.training_loop`.
"""

from __future__ import annotations

from typing import Any

from engine.jobs.attention_check import check_packing
from engine.jobs.base_model import Placement, choose_placement, load_base
from engine.jobs.checkpoints import latest_checkpoint
from engine.jobs.job import (
    Materials,
    Result,
    Watcher,
    begin,
    conclude,
    conclude_saved,
    describe_run,
    gather,
    result_of,
)
from engine.jobs.lora_config import Targets, adapt, find_targets
from engine.jobs.ranks import Alone
from engine.jobs.run_folder import RunFolder, open_run_folder
from engine.jobs.run_log import both, open_log
from engine.jobs.saving import save_adapter
from engine.jobs.settings import JobSettings
from engine.jobs.stopping import StopRequest
from engine.jobs.training_loop import Trainee, train


def run_lora(settings: JobSettings, watcher: Watcher, stop: StopRequest) -> Result:
    """Train, save, merge, report.

    Raises:
        UsageError, ModelError, DataError: what was asked for cannot be done; nothing was changed.
        Stopped: a signal came; a checkpoint holds what is done.
        Error: memory or disk ran out, or the training diverged; the last checkpoint is whole.
    """
    placement = choose_placement(settings.training)
    materials = gather(settings, watcher, stop)
    with open_run_folder(settings.output) as folder:
        if begin(folder, settings, materials):
            return finish_again(folder, settings, materials, watcher)
        watcher.busy(f"loading {materials.checkpoint.name}")
        base = load_base(materials.checkpoint, placement)
        targets = find_targets(base, settings.lora.target_modules)
        model = adapted(base, settings, placement, materials)
        stop.leave_if_made("training began")
        say_targets(targets, watcher)
        folder.write(
            describe_run(settings, materials, model=model, targets=targets, placement=placement)
        )
        held = [model]
        del base, model
        _train(held[0], folder, settings, placement, materials, watcher, stop)
        return conclude(
            folder,
            settings,
            materials,
            watcher,
            save_adapters=lambda path: save_adapter(held[0], materials.checkpoint, path),
            release=held.clear,
        )


def adapted(base: Any, settings: JobSettings, placement: Placement, materials: Materials) -> Any:
    """The model with fresh adapters, ready to train."""
    if placement.is_4bit:
        from peft import prepare_model_for_kbit_training

        ready: Any = prepare_model_for_kbit_training  # without annotations
        base = ready(base, use_gradient_checkpointing=False)
    model = adapt(base, settings.lora, settings.training.seed)
    if settings.training.gradient_checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    if settings.data.packing:
        check_packing(model, placement, materials.sizes.vocab_size)
    return model


def _train(
    model: Any,
    folder: RunFolder,
    settings: JobSettings,
    placement: Placement,
    materials: Materials,
    watcher: Watcher,
    stop: StopRequest,
) -> None:
    """All steps, from the last checkpoint on if there is one."""
    latest = latest_checkpoint(folder.checkpoints)
    resumed_step = int(latest.name.removeprefix("step-")) if latest is not None else None
    with open_log(folder, settings, resumed_step) as log:
        for sentence in materials.dataset.summary.sentences():
            log.say(sentence)
        train(
            Trainee(
                model=model,
                placement=placement,
                settings=settings.training,
                train=materials.dataset.train,
                validation=materials.dataset.validation,
                checkpoints=folder.checkpoints,
                listener=both(log, watcher.event),
                stop=stop,
                ranks=Alone(),
            ),
            resume_from=latest,
        )


def say_targets(targets: Targets, watcher: Watcher) -> None:
    """Which layers are adapted, and which are not."""
    watcher.say(f"adapting {targets.sentence}")
    if targets.untouched:
        watcher.say(f"not adapted, as they are no linear layers: {', '.join(targets.untouched)}")


def finish_again(
    folder: RunFolder, settings: JobSettings, materials: Materials, watcher: Watcher
) -> Result:
    """A run that is over: nothing is left to train, but a merge may be wanted now."""
    run = folder.read() or {}
    watcher.say(f"the run in {folder.path} is over already: nothing is left to train")
    if settings.output.merge and not folder.merged.is_dir():
        return conclude_saved(folder, settings, materials.checkpoint, watcher)
    return result_of(folder, run.get("figures", {}))
