"""Fine-tune by LoRA: in one process, or in several that each hold the whole model.

Several processes learn from rows of their own and add up their gradients once a step; a step is
the same as one process's with as many rows. What happens before and after stands in
`engine.jobs.team_job`; the loop in `engine.jobs.training_loop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.jobs.attention_check import check_packing
from engine.jobs.base_model import Placement, choose_placement, load_base
from engine.jobs.job import Materials, Result, Watcher, describe_run
from engine.jobs.lora_config import Targets, adapt, find_targets, trainable_parameters
from engine.jobs.process_group import ProcessGroup, open_group
from engine.jobs.run_folder import RunFolder
from engine.jobs.settings import JobSettings, TrainingSettings
from engine.jobs.stopping import StopRequest
from engine.jobs.team import Team, alone
from engine.jobs.team_job import Learner, TeamJob, run_together
from engine.jobs.team_placement import check_room, place, wait_for_all


def run_lora(settings: JobSettings, watcher: Watcher, stop: StopRequest) -> Result:
    """Train in this process, save, merge, report; see `run_together`."""
    result = run_lora_together(settings, alone(), watcher, stop)
    assert result is not None  # to the first process
    return result


def run_lora_together(
    settings: JobSettings, team: Team, watcher: Watcher, stop: StopRequest
) -> Result | None:
    """The same as one process of several; see `run_together`."""
    return run_together(WholeModels(), settings, team, watcher, stop)


class WholeModels:
    """Each process has all of the model; see `engine.jobs.team_job.Method`."""

    def place(self, training: TrainingSettings, team: Team, stop: StopRequest) -> Placement:
        """A GPU each, or the CPU."""
        return choose_placement(training) if team.num_ranks == 1 else place(training, team, stop)

    def sentences(self, team: Team, placement: Placement) -> Sequence[str]:
        """Nothing of one process."""
        if team.num_ranks == 1:
            return ()
        return (f"{team.sentence}; each holds the whole model on {placement.device.type}",)

    def check_folder(self, folder: RunFolder) -> None:
        """However many began a run, as many rows a step are enough to go on."""

    @contextmanager
    def learner(self, job: TeamJob) -> Iterator[Learner]:
        """The whole model, with the first process's fresh adapters."""
        settings, team, materials = job.settings, job.team, job.materials
        check_room(team, materials.checkpoint, job.placement, job.stop)
        with open_group(team, job.placement.device):
            job.watcher.busy(f"loading {materials.checkpoint.name}")
            base = load_base(materials.checkpoint, job.placement)
            targets = find_targets(base, settings.lora.target_modules)
            model = adapted(base, settings, job.placement, materials)
            job.stop.leave_if_made("training began")
            say_targets(targets, job.watcher)
            said = describe_run(
                settings,
                materials,
                model=model,
                targets=targets,
                placement=job.placement,
                processes=team.num_ranks,
            )
            wait_for_all(team, job.stop)
            ranks = ProcessGroup(job.placement.device)
            ranks.share_weights([it for _, it in trainable_parameters(model)])
            yield Learner(model=model, ranks=ranks, said=said)


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


def say_targets(targets: Targets, watcher: Watcher) -> None:
    """Which layers are adapted, and which are not."""
    watcher.say(f"adapting {targets.sentence}")
    if targets.untouched:
        watcher.say(f"not adapted, as they are no linear layers: {', '.join(targets.untouched)}")
