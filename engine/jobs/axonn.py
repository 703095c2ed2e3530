"""Fine-tune by LoRA on AxoNN's sharded layers: several processes, tensor x data parallel.

What happens before and after is as for `engine.jobs.lora` (`engine.jobs.team_job`); here stands
what is AxoNN's: the grid of the processes, and layers of which each process holds a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import torch

from engine.jobs.attention_check import check_packing
from engine.jobs.axonn_cpu import LOUD
from engine.jobs.axonn_grid import Grid, Parallelism, make_grid
from engine.jobs.axonn_layers import shard
from engine.jobs.axonn_library import check_version, start_axonn
from engine.jobs.axonn_ranks import AxonnRanks
from engine.jobs.base_model import Placement, load_base
from engine.jobs.job import Result, Watcher, describe_run
from engine.jobs.lora import say_targets
from engine.jobs.lora_config import adapt, find_targets, trainable_parameters
from engine.jobs.process_group import open_group
from engine.jobs.run_folder import RunFolder
from engine.jobs.settings import JobSettings, TrainingSettings
from engine.jobs.stopping import StopRequest
from engine.jobs.team import Team
from engine.jobs.team_job import Learner, TeamJob, run_together
from engine.jobs.team_placement import num_gpus, place, wait_for_all, wait_for_room
from proto.errors import UsageError

PARALLELISM: Final = "parallelism"  # in run.json


def run_axonn(
    settings: JobSettings,
    parallelism: Parallelism,
    team: Team,
    watcher: Watcher,
    stop: StopRequest,
) -> Result | None:
    """Train, save, merge, report; see `run_together`."""
    check_version()
    grid = make_grid(parallelism, team.num_ranks, team.launcher)
    check_settings(settings)
    return run_together(Sharded(grid), settings, team, watcher, stop)


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


@dataclass(frozen=True, slots=True)
class Sharded:
    """Each process has its part of the layers; see `engine.jobs.team_job.Method`."""

    grid: Grid

    def place(self, training: TrainingSettings, team: Team, stop: StopRequest) -> Placement:
        """A GPU each; the CPU where that was asked for.

        Raises:
            UsageError: there is no GPU.
        """
        if training.device != "cpu" and num_gpus() == 0:
            raise UsageError(
                f"AxoNN computes on GPUs, and torch {torch.__version__} sees none on "
                f"{team.hosts[team.rank]}: run it where each rank has one, or use manager finetune "
                "lora. --device cpu is a test mode over gloo: it shows that the arithmetic is "
                "right, and nothing of speed."
            )
        return place(training, team, stop)

    def sentences(self, team: Team, placement: Placement) -> Sequence[str]:
        """Who is there, and what for."""
        sentence = f"{team.sentence}; {self.grid.sentence}"
        return (sentence, LOUD) if placement.device.type == "cpu" else (sentence,)

    def check_folder(self, folder: RunFolder) -> None:
        """A run goes on with the grid that it was begun with.

        Raises:
            UsageError: it was another one.
        """
        before = (folder.read() or {}).get(PARALLELISM)
        if before is not None and before != self.grid.to_json():
            try:
                was = Grid(**before).sentence
            except TypeError:
                was = str(before)
            raise UsageError(
                f"--resume: the run in {folder.path} was started with {was}, and this is "
                f"{self.grid.sentence}: start it with the same, or pass --overwrite to begin anew."
            )

    @contextmanager
    def learner(self, job: TeamJob) -> Iterator[Learner]:
        """The model in shards, with the first process's fresh adapters."""
        settings, team, materials, watcher = job.settings, job.team, job.materials, job.watcher
        with open_group(team, job.placement.device, even_alone=True):
            start_axonn(self.grid, job.placement.device)
            # Sharded on the CPU: a GPU may have no room for the whole.
            on_cpu = replace(job.placement, device=torch.device("cpu"))
            wait_for_room(team, materials.checkpoint, on_cpu, watcher, job.stop)
            watcher.busy(f"loading {materials.checkpoint.name}")
            base = load_base(materials.checkpoint, on_cpu)
            targets = find_targets(base, settings.lora.target_modules)
            model = adapt(base, settings.lora, settings.training.seed)
            say_targets(targets, watcher)
            said = describe_run(
                settings,
                materials,
                model=model,
                targets=targets,
                placement=job.placement,
                processes=team.num_ranks,
            )
            shards = shard(model, self.grid)
            for sentence in shards.sentences(self.grid):
                watcher.say(sentence)
            job.stop.leave_if_made("training began")
            model.to(job.placement.device)
            if settings.training.gradient_checkpointing:
                model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            wait_for_all(team, job.stop)
            ranks = AxonnRanks(job.placement.device)
            ranks.share_weights([it for _, it in trainable_parameters(model)])
            if settings.data.packing:
                check_packing(model, job.placement, materials.sizes.vocab_size)
            yield Learner(
                model=model,
                ranks=ranks,
                said=said | {PARALLELISM: self.grid.to_json()},
                sentences=shards.sentences(self.grid),
                total_weights=shards.total_weights,
            )
