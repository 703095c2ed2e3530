"""What every fine-tuning job does before and after it trains, whichever way it was launched.

`gather` finds the model and makes rows of the data; `begin` looks whether a run can go on;
`conclude` saves, merges and reports. What lies between is `engine.jobs.lora`, or SFT, or AxoNN;
each of them lets its first process alone write files.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.checkpoint import Checkpoint
from engine.jobs.base_model import ModelSizes, Placement, load_tokenizer, read_sizes, reference
from engine.jobs.dataset import Dataset, prepare
from engine.jobs.events import Event
from engine.jobs.lora_config import Targets, count_weights
from engine.jobs.report import summarize, versions, write_curve, write_report
from engine.jobs.run_folder import RunFolder
from engine.jobs.saving import save_merged
from engine.jobs.settings import JobSettings, what_counts
from engine.jobs.stopping import StopRequest
from proto.errors import UsageError

RUNNING = "running"
FINISHED = "finished"


class Watcher(Protocol):
    """Who shows a job to people."""

    def busy(self, text: str) -> None:
        """This is going on; it is forgotten when the next thing is."""
        ...

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def event(self, event: Event) -> None:
        """Something happened in the training."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """What is trained on what."""

    checkpoint: Checkpoint
    tokenizer: Any | None
    sizes: ModelSizes
    dataset: Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Where everything is, and how it went."""

    save_dir: Path
    adapters: Path
    merged: Path | None
    report: Path
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "save_dir": str(self.save_dir),
            "lora_adapters": str(self.adapters),
            "merged_model": None if self.merged is None else str(self.merged),
            "report": str(self.report),
            **self.figures,
        }


def gather(settings: JobSettings, watcher: Watcher, stop: StopRequest) -> Materials:
    """Find the base model, read its tokenizer and the data.

    Raises:
        ModelError, DataError, UsageError: in one sentence, before any weight is read.
        Stopped: a signal came meanwhile.
    """
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    watcher.busy("reading the model's config and tokenizer")
    checkpoint = open_base(settings.base_model)
    tokenizer = load_tokenizer(checkpoint)
    sizes = read_sizes(checkpoint)

    def show(samples: int) -> None:
        stop.leave_if_made("the data was read")
        watcher.busy(f"reading data: {samples} samples")

    watcher.busy("reading data")
    dataset = prepare(
        settings.data,
        tokenizer=tokenizer,
        model_name=checkpoint.name,
        vocab_size=sizes.vocab_size,
        max_context=sizes.max_context,
        seed=settings.training.seed,
        on_progress=show,
    )
    summary = dataset.summary
    watcher.say(_data_line("training", asdict(summary.train)))
    if summary.validation is not None:
        watcher.say(_data_line("validation", asdict(summary.validation)))
    for sentence in summary.sentences():
        watcher.say(sentence)
    return Materials(checkpoint=checkpoint, tokenizer=tokenizer, sizes=sizes, dataset=dataset)


def open_base(model: str | None) -> Checkpoint:
    """The checkpoint of a base model.

    Raises:
        ModelError: there is none; in the words of this command's option.
    """
    from proto.errors import ModelError

    try:
        return Checkpoint(model)
    except ModelError as exc:
        raise ModelError(str(exc).replace("--model", "--base-model")) from exc


def begin(
    folder: RunFolder,
    settings: JobSettings,
    materials: Materials,
    processes: int = 1,
) -> bool:
    """Whether the run in this folder is over already.

    Raises:
        UsageError: the folder's run was started with other settings, data or model.
    """
    said = folder.read()
    if said is None:
        return False
    now = _identity(settings, materials, processes)
    before = said.get("identity", {})
    changed = [
        _change(name, before.get(name), value)
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise UsageError(
            f"--resume: the run in {folder.path} was started otherwise: {'; '.join(changed)}. Pass "
            "what it was started with, or --overwrite to begin anew."
        )
    return said.get("state") == FINISHED


def describe_run(
    settings: JobSettings,
    materials: Materials,
    *,
    model: Any,
    targets: Targets,
    placement: Placement,
    processes: int = 1,
) -> dict[str, Any]:
    """What run.json says of a run that begins."""
    trainable, weights = count_weights(model)
    summary = materials.dataset.summary
    return {
        "state": RUNNING,
        "identity": _identity(settings, materials, processes),
        "settings": settings.to_json(),
        "model": {
            "name": materials.checkpoint.name,
            "reference": reference(materials.checkpoint),
            "targets": targets.sentence,
            "trainable": trainable,
            "weights": weights,
        },
        "data": {**summary.to_json(), "sentences": summary.sentences()},
        "device": str(placement.device),
        "dtype": placement.dtype_name,
        "processes": processes,
        "versions": versions(),
    }


def conclude(
    folder: RunFolder,
    settings: JobSettings,
    materials: Materials,
    watcher: Watcher,
    *,
    save_adapters: Callable[[Path], None],
    release: Callable[[], None] = lambda: None,
) -> Result:
    """Save the adapter, merge it, draw and write the report.

    Args:
        save_adapters: writes the adapter's folder; see `engine.jobs.saving`.
        release: gives the training model's memory back before the base is loaded once more.
    Raises:
        Error: something cannot be written; what was trained is in the last checkpoint.
    """
    watcher.busy("saving the adapter")
    save_adapters(folder.adapters)
    release()
    return conclude_saved(folder, settings, materials.checkpoint, watcher)


def conclude_saved(
    folder: RunFolder, settings: JobSettings, checkpoint: Checkpoint, watcher: Watcher
) -> Result:
    """The same for an adapter that is saved already."""
    if settings.output.merge:
        watcher.busy("merging the adapter into the base model")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        save_merged(checkpoint, folder.adapters, folder.merged)
    watcher.busy("writing the report")
    figures = summarize(folder)
    write_curve(folder)
    run = folder.read() or {}
    run |= {"state": FINISHED, "figures": figures}
    write_report(folder, run, figures)
    folder.write(run)
    return result_of(folder, figures)


def finish_again(
    folder: RunFolder, settings: JobSettings, materials: Materials, watcher: Watcher
) -> Result:
    """A run that is over: nothing is left to train, but a merge may be wanted now."""
    run = folder.read() or {}
    watcher.say(f"the run in {folder.path} is over already: nothing is left to train")
    if settings.output.merge and not folder.merged.is_dir():
        return conclude_saved(folder, settings, materials.checkpoint, watcher)
    return result_of(folder, run.get("figures", {}))


def result_of(folder: RunFolder, figures: Mapping[str, Any]) -> Result:
    """Of a run that is over."""
    return Result(
        save_dir=folder.path,
        adapters=folder.adapters,
        merged=folder.merged if folder.merged.is_dir() else None,
        report=folder.report,
        figures=dict(figures),
    )


def _identity(settings: JobSettings, materials: Materials, processes: int) -> dict[str, Any]:
    """What a run that goes on must have in common with its beginning."""
    training = settings.training
    counted = what_counts(settings)
    # Rows of a step, however they are divided over processes and micro-batches.
    counted["training.rows a step"] = training.batch_size * training.accumulation * processes
    # JSON has no tuples; what was read is to be compared with what is.
    counted["lora.target_modules"] = list(settings.lora.target_modules)
    dataset = materials.dataset
    return {
        **counted,
        "base model": materials.checkpoint.fingerprint,
        "training data": dataset.train.digest,
        "validation data": "" if dataset.validation is None else dataset.validation.digest,
    }


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("base model", "training data", "validation data"):
        return f"the {name} is not the same"
    return f"{name.rpartition('.')[2]} was {before} and is {now}"


def _data_line(name: str, split: Mapping[str, Any]) -> str:
    lengths = split["lengths"]
    return (
        f"{name} data: {split['samples']} samples in {split['rows']} rows of {lengths['p50']} "
        f"tokens (p95 {lengths['p95']}, longest {lengths['max']}), "
        f"{split['learnt_tokens']} of {split['tokens']} tokens learnt"
    )
